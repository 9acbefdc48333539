"""Pictures of biases, attention and errors."""
