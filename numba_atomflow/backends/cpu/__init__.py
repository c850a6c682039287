"""The CPU backend: every op as numba kernels over host memory."""

from numba_atomflow.backends.cpu.backend import CpuBackend, cpu_plan

__all__ = ["CpuBackend", "cpu_plan"]
