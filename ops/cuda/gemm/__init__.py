"""Projections of many tokens: W8A16 GEMM on tensor cores."""
