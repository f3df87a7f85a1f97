"""The fastest checkpoint plan for a budget, given the costs of the options; needs no torch."""
