"""What each option costs on each layer, measured in simulated steps of the whole model."""
