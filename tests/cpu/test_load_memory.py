"""Loading a large checkpoint onto GPUs takes memory of the host for one matrix at a time, of mapped pages."""

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
private, resident, copied = [], [], []

def note_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    private.append(1024 * int(values["RssAnon"][0]))
    resident.append(1024 * int(values["VmRSS"][0]))

class ForgetfulDriver(PretendedDriver):
    def _cuMemcpyHtoDAsync(self, address, source, nbytes, stream):
        ctypes.memmove(SCRATCH, source, nbytes)  # read as a device does, and kept nowhere
        note_memory()
        copied.append(nbytes)

    def _cuMemsetD8Async(self, address, value, nbytes, stream):
        pass

    _cuMemsetD32Async = _cuMemsetD8Async

patch = pytest.MonkeyPatch()
pretend_compiler(patch)
machine = ForgetfulDriver().install(patch)
machine.gpus = 2
with Engine.load(sys.argv[1], "cuda", 64, gpus=int(sys.argv[2])):
    pass
growth = {"private": max(private) - private[0], "resident": max(resident) - resident[0]}
print(json.dumps(growth | {"copied": sum(copied)}))
"""


def write_sparse_checkpoint(path: Path) -> int:
    """A checkpoint of zeros that takes no room on the disk; returns its bytes."""
    writer = CheckpointWriter(path, GEOMETRY, TextAssets(), {}, {})
    path.write_bytes(writer._header)
    os.truncate(path, writer.total_bytes)
    return writer.total_bytes


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("gpus", [1, 2])
def test_no_matrix_is_copied_on_the_host_and_none_stays_in_memory(tmp_path: Path, gpus: int) -> None:
    size = write_sparse_checkpoint(tmp_path / "model.safetensors")
    command = [sys.executable, "-c", LOAD, tmp_path / "model.safetensors", str(gpus)]
    figures = json.loads(run(command, cwd=REPOSITORY, text=True, check=True).stdout)
    assert size > 550e6
    assert figures["copied"] == pytest.approx(size, rel=0.01), "each row goes to one GPU"
    largest = max(2 * GEOMETRY.ffn, GEOMETRY.vocabulary) * GEOMETRY.hidden
    assert figures["private"] < largest / 8
    assert figures["resident"] < 1.2 * largest
