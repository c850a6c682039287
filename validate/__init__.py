"""Ground truth, probes and comparison: how the engine is held against a reference implementation."""
