"""Who owns each byte, and when: what is watched while a training step runs."""
