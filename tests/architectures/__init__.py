"""The architectures that memscope is tried on, each in a tiny size and in its usual one."""
