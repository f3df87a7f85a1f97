"""The device catalogue, and estimates of an operator's time on a device."""
