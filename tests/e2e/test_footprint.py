"""Memory of `generate`, and speed of decoding compared with NumPy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALLOWANCE = 350_000_000  # bytes above the checkpoint's own size
COMPILER = 50_000_000  # bytes more while kernels are compiled

GENERATE = """
import sys
from numba_atomflow import Engine, SamplingParams
with Engine.load(sys.argv[1]) as engine:
    prompt = "The quick brown fox jumps over the lazy dog. " * 60
    engine.generate(prompt, SamplingParams(max_tokens=16)).finish()
    assert engine.position > 512  # more than one block of the prompt, and some tokens
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024)
"""


def peak_bytes(checkpoint: Path) -> int:
    run = subprocess.run(
        [sys.executable, "-c", GENERATE, str(checkpoint)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(run.stdout)


def test_peak_memory_is_the_checkpoint_and_350_mb(smollm2_checkpoint: Path) -> None:
    first, second = (peak_bytes(smollm2_checkpoint) for _ in range(2))
    size = smollm2_checkpoint.stat().st_size
    assert second <= size + ALLOWANCE
    assert first <= size + ALLOWANCE + COMPILER  # the first start compiles, unless other tests have


@pytest.mark.slow
def test_decoding_is_faster_than_numpy(smollm2_checkpoint: Path) -> None:
    command = [sys.executable, "scripts/bench_numpy.py", str(smollm2_checkpoint), "-n", "8", "-p", "16", "-r", "2"]
    # One thread on both sides: how fast threads wake up depends on the machine, and on what else runs on it.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NUMBA_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run([*command, "--json"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    result = json.loads(run.stdout)
    assert result["numpy_ms"]["min"] >= 1.5 * result["ours_ms"]["min"], result
