"""Training on a stream of kept indices."""
