"""Kernel families, one file each: cost model, NumPy reference, CPU kernel."""
