"""Memory of `generate`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ALLOWANCE = 160_000_000  # bytes above the checkpoint's own size
COMPILER = 200_000_000  # bytes more while kernels are compiled

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


def test_peak_memory_is_the_checkpoint_and_160_mb(smollm2_checkpoint: Path) -> None:
    first, second = (peak_bytes(smollm2_checkpoint) for _ in range(2))
    size = smollm2_checkpoint.stat().st_size
    assert second <= size + ALLOWANCE
    assert first <= size + ALLOWANCE + COMPILER  # the first start compiles, unless other tests have
