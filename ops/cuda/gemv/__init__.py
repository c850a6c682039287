"""Projections of a few tokens: W8A16 GEMV on tensor cores (mma.m16n8k16)."""
