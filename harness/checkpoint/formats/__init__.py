"""One module per container."""
