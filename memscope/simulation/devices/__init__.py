"""The catalogue of devices, and how long an operator takes on one."""
