"""Recorders for the training loops of frameworks. Each framework has a module, which imports the framework."""
