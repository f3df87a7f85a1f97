"""Finds the strategies, and the layers to checkpoint, that make a training step fit a budget."""
