"""Which strategies to switch on, and which layers to checkpoint, so that a training step fits a budget."""
