"""Shared by nsys_profile.py and ncu_profile.py: finding the tool, options of the model, running the child process."""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

CAPTURED = "decode"  # the NVTX range that is profiled
PRODUCTS = {"nsys": "Nsight Systems", "ncu": "Nsight Compute"}
CHILD = Path(__file__).with_name("traced_decode.py")


class ToolError(Exception):
    """A tool is missing or failed: one sentence."""


def model_options(parser: argparse.ArgumentParser) -> None:
    """Options of the model; `model_arguments` passes them on."""
    parser.add_argument("model", nargs="?", help="checkpoint, or the name of one (default: the demo model)")
    parser.add_argument("--geometry", metavar="NAME", help="instead of a model: a well-known one with random weights")
    parser.add_argument("-d", "--depth", type=int, default=0, metavar="N", help="tokens in the KV cache (default: 0)")
    parser.add_argument("--backend", default="auto", help="as for numba-atomflow generate")


def model_arguments(options: argparse.Namespace) -> list[str]:
    """The same options for the child process."""
    arguments = ["--depth", str(options.depth), "--backend", options.backend]
    if options.geometry:
        arguments += ["--geometry", options.geometry]
    return arguments + ([options.model] if options.model else [])


def find_tool(name: str, path: Path | None) -> str:
    """Path of a tool: as given, or on PATH.

    Raises:
        ToolError: there is none.
    """
    found = shutil.which(path or name)
    if found is None:
        raise ToolError(
            f"{path or name} was not found: install {PRODUCTS[name]} from https://developer.nvidia.com/tools-overview "
            f"(it is part of the CUDA toolkit), or give its path with --{name}."
        )
    return found


def check_recording(out: Path) -> None:
    """Check before profiling that a report can be made.

    Raises:
        ToolError: nvtx is not installed, or there is no folder for the report.
    """
    if find_spec("nvtx") is None:
        raise ToolError("The package nvtx, which marks the profiled range, is missing; run `pip install nvtx`.")
    if not out.parent.is_dir():
        raise ToolError(f"There is no folder {out.parent} for the report; make it first.")


def run(command: Sequence[str]) -> str:
    """Run a tool; its output.

    Raises:
        ToolError: it failed; the message has the last line with an error of its output.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        last = (errors or lines or ["it wrote nothing"])[-1].rstrip(".")
        raise ToolError(f"{Path(command[0]).name} failed with exit code {done.returncode}: {last}.")
    return done.stdout


def leave(error: Exception) -> int:
    """Print an error; the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return 2
