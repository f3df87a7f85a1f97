"""Offloading to the host: the strategy `offload`, and what it shares with the layers of a checkpoint plan."""
