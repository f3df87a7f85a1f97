"""A GPU that is not there: what a training step would allocate on it."""
