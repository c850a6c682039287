"""The parts of bench_prefill.py."""
