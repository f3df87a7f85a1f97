"""The simulated GPU as the target's code sees it."""
