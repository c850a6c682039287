"""Loading a large checkpoint onto several GPUs takes no memory of the host but the page cache."""

import json
import os
import sys
from pathlib import Path

import pytest
from child_processes import run
from tiny_models import tiny_geometry

pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
pytest.importorskip("numba_cuda", reason="the CUDA backend needs it; there is none for macOS")

from numba_atomflow.checkpoint.writer import CheckpointWriter
from numba_atomflow.text.codec import TextAssets

REPOSITORY = Path(__file__).resolve().parents[2]
GEOMETRY = tiny_geometry(
    layers=2, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocabulary=32000, tied_embeddings=True
)

LOAD = """
import ctypes, json, sys
from pathlib import Path

sys.path.insert(0, "tests/support")
import pytest
from pretended_gpu import PretendedDriver, pretend_compiler
from numba_atomflow import Engine

SCRATCH = (ctypes.c_uint8 * (64 << 20))()
ctypes.memset(SCRATCH, 1, len(SCRATCH))
private, copied = [], []

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

class ForgetfulDriver(PretendedDriver):
    def _cuMemcpyHtoDAsync(self, address, source, nbytes, stream):
        ctypes.memmove(SCRATCH, source, nbytes)  # read as a device does, and kept nowhere
        private.append(anonymous())
        copied.append(nbytes)

    def _cuMemsetD8Async(self, address, value, nbytes, stream):
        pass

patch = pytest.MonkeyPatch()
pretend_compiler(patch)
machine = ForgetfulDriver().install(patch)
machine.gpus = 2
with Engine.load(sys.argv[1], "cuda", 64, gpus=2):
    pass
print(json.dumps({"grown": max(private) - private[0], "copied": sum(copied)}))
"""


def write_sparse_checkpoint(path: Path) -> int:
    """A checkpoint of zeros that takes no room on the disk; returns its bytes."""
    writer = CheckpointWriter(path, GEOMETRY, TextAssets(), {}, {})
    path.write_bytes(writer._header)
    os.truncate(path, writer.total_bytes)
    return writer.total_bytes


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_matrix_is_copied_on_the_host(tmp_path: Path) -> None:
    size = write_sparse_checkpoint(tmp_path / "model.safetensors")
    command = [sys.executable, "-c", LOAD, tmp_path / "model.safetensors"]
    figures = json.loads(run(command, cwd=REPOSITORY, text=True, check=True).stdout)
    assert size > 550e6
    assert figures["copied"] == pytest.approx(size, rel=0.01), "each row goes to one GPU"
    largest = 2 * GEOMETRY.ffn * GEOMETRY.hidden
    assert figures["grown"] < largest / 8
