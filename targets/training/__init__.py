"""What the training commands of targets share: options, the order of data, steps, checkpoints and metrics."""
