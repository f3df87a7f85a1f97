"""The machine that a simulated program sees: a real host, and a GPU that is not there."""
