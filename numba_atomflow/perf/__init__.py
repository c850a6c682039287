"""Measurements: benchmark, profile, timeline, compile times, perplexity."""
