"""What fits: the largest micro-batch, the longest context, and the devices that hold a training step."""
