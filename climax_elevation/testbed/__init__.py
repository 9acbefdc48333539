"""Where the answer is known: real ground, a simulated tracer, and small networks that are fitted to it."""
