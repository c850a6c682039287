"""Measuring: benchmark, profile, time line, compile times, perplexity."""
