"""All that is metres, m/s and degrees: from files and a model's input to a value a patch."""
