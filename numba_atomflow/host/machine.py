"""Facts about the machine for reports: hardware, driver, versions, commit."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from numba_atomflow import __version__

_ROOT = Path(__file__).resolve().parents[2]
_DRIVER = Path("/proc/driver/nvidia/version")


def machine_record() -> dict[str, Any]:
    """All of it, ready for JSON."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "nvidia_driver": nvidia_driver(),
        "cuda_driver": cuda_driver(),
        "versions": versions(),
        "commit": commit(),
    }


def versions() -> dict[str, str | None]:
    """Versions of this program and its dependencies; None for a package that is not installed."""
    packages = ("numba", "llvmlite", "numpy", "numba-cuda", "cuda-python")
    return {
        "numba-atomflow": __version__,
        "python": platform.python_version(),
        **{package: installed_version(package) for package in packages},
    }


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, or None."""
    from importlib import metadata  # slow to import, and not needed for --help

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit(folder: Path = _ROOT) -> str | None:
    """The checkout's commit, with a plus if files were changed; None for an installed package.

    Args:
        folder: the root of the checkout. A repository in a parent folder does not count.
    """
    if not (folder / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def cpu_name() -> str:
    """The CPU's model name, from /proc/cpuinfo where it exists."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def nvidia_driver(file: Path = _DRIVER) -> str | None:
    """Version of the NVIDIA driver's kernel module, or None."""
    try:
        found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found[1] if found else None


def cuda_driver() -> str | None:
    """The CUDA version that the NVIDIA driver supports, or None; by ctypes, without any package."""
    import ctypes

    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        version = ctypes.c_int()
        if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"
