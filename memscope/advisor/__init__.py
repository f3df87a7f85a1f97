"""Which strategies to switch on, and which blocks to checkpoint, so that a training step fits a budget."""
