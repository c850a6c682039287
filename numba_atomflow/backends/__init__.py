"""What runs the list of ops: the CPU here and now, an NVIDIA GPU where there is one."""
