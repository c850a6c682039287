"""Compiling, launching and capturing kernels; uploading weights."""
