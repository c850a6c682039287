"""A second start compiles nothing; an edit in ops/ recompiles. Both from numba's compilation events."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from child_processes import run
from cli_runner import ROOT, environment

from numba_atomflow.ops import jit

# Runs the lines of its first argument and reports, to a file, which functions numba compiled meanwhile.
RECORD = """
import json, sys
from numba.core import event
with event.install_recorder("numba:compile") as recorder:
    exec(sys.argv[1])
starts = [e.data["dispatcher"].py_func for _, e in recorder.buffer if e.is_start]
with open(sys.argv[2], "w") as file:
    json.dump({"compiled": [f"{f.__module__}.{f.__name__}" for f in starts], "result": result}, file)
"""

GENERATE = """
import contextlib, io
from numba_atomflow.cli import run
with contextlib.redirect_stdout(io.StringIO()) as out:
    assert run(["generate", {prompt!r}, "--model", {model!r}, "-n", "5", "--ignore-eos", "--json"]) == 0
result = json.loads(out.getvalue())["token_ids"]
"""

# `swiglu` is compiled from ops/projection.py; it calls `silu` of ops/activation.py.
ONE_KERNEL = """
import numpy as np
from numba_atomflow.ops.projection import swiglu
out = np.empty((1, 1), np.float32)
swiglu(np.array([[2.0, 1.0]], np.float32), out)
result = float(out[0, 0])
"""


def record(home: Path, lines: str, tree: Path = ROOT) -> tuple[list[str], Any]:
    """Names of the functions that a process running `lines` compiles, and its result."""
    answer = home / "answer.json"
    run(
        [sys.executable, "-c", RECORD, lines, str(answer)],
        env=environment(home) | {"PYTHONPATH": str(tree)},
        cwd=home,
        check=True,
    )
    events = json.loads(answer.read_text())
    return events["compiled"], events["result"]


def copy_what_is_compiled(target: Path, *without: str) -> None:
    """To the home `target`, what this process's home has of this source, but some kernels."""
    here = jit.cache_folder()
    assert here is not None
    there = target / "compiled" / here.name / "ops"
    there.mkdir(parents=True)
    for kind in ("*.nbi", "*.nbc"):  # indices first: another process may be adding to both
        for path in (here / "ops").glob(kind):
            if path.name.partition("-")[0] not in without:
                shutil.copy(path, there)


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path: Path, tiny_checkpoint: Path) -> None:
    copy_what_is_compiled(tmp_path, "projection.project_token", "attention.attend_chunk")  # all would take 20 s
    short, lines = (GENERATE.format(model=str(tiny_checkpoint), prompt=text) for text in ("A", "A longer prompt"))
    decode, _ = record(tmp_path, short)
    assert "numba_atomflow.ops.projection.project_token" in decode
    assert "numba_atomflow.ops.attention.attend_chunk" not in decode  # a prompt of one token does not need it
    first, tokens = record(tmp_path, lines)
    assert "numba_atomflow.ops.attention.attend_chunk" in first
    assert "numba_atomflow.ops.projection.project_token" not in first
    second, same_tokens = record(tmp_path, lines)
    assert second == []
    assert same_tokens == tokens


def test_loading_a_kernel_does_not_prepare_the_compiler(tmp_path: Path) -> None:
    lines = (
        ONE_KERNEL
        + "from numba.core.runtime import rtsys\n"
        + "result = ['scipy.linalg' in sys.modules, 'numba.np.arraymath' in sys.modules, rtsys._init]\n"
    )
    assert record(tmp_path, lines)[1] == [True, True, True]
    assert record(tmp_path, lines) == ([], [False, False, False])


ALLOCATING_KERNEL = """
import numpy as np
from numba_atomflow.ops.projection import project_tokens
x, y = np.ones((2, 128), np.float32), np.empty((2, 3), np.float32)
project_tokens(np.full((3, 128), 56, np.int8), np.ones((3, 1), np.float32), x, y, False)
result = [y.tolist(), "numba.np.arrayobj" in sys.modules]
"""


def test_loading_a_kernel_imports_no_implementations_of_what_it_calls(tmp_path: Path) -> None:
    result = [[128.0] * 3] * 2
    assert record(tmp_path, ALLOCATING_KERNEL)[1] == [result, True]
    assert record(tmp_path, ALLOCATING_KERNEL) == ([], [result, False])


# An allocation that fails raises in numba's function, whose environment the cache does not keep.
FAILING_KERNEL = """
import numpy as np
from failing import kernel
result = [kernel(3)]
try:
    kernel(1 << 60)
except MemoryError as error:
    result.append(str(error))
"""
FAILING_SOURCE = """
import numpy as np
from numba_atomflow.ops.jit import cpu_kernel

@cpu_kernel(parallel=False)
def kernel(n):
    values = np.empty(n, np.float32)
    values[n - 1] = n
    return values[n - 1]
"""


def test_a_loaded_kernel_raises_what_a_compiled_one_does(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING_SOURCE)
    first, result = record(tmp_path, "sys.path.insert(0, '.')\n" + FAILING_KERNEL)
    assert "failing.kernel" in first
    assert result == [3.0, "Allocation failed (probably too large)."]
    assert record(tmp_path, "sys.path.insert(0, '.')\n" + FAILING_KERNEL) == ([], result)


BLAS_KERNEL = """
import numpy as np
import scipy.linalg.cython_blas
from numba_atomflow.ops.scale_search import search_scales
rng = np.random.default_rng(1)
weights, inputs = rng.standard_normal((2, 9, 128), np.float32)
result = search_scales(weights, inputs.T @ inputs).tolist()
"""


def test_a_loaded_kernel_calls_blas_and_another_is_compiled_beside_it(tmp_path: Path) -> None:
    first, result = record(tmp_path, BLAS_KERNEL)
    assert "numba_atomflow.ops.scale_search._search_group" in first
    second, same = record(tmp_path, BLAS_KERNEL + ONE_KERNEL.replace("result", "another"))
    assert second[0] == "numba_atomflow.ops.projection.swiglu"
    assert same == result


def copy_of_the_package(target: Path) -> Path:
    """The package in the layout of an installation."""
    shutil.copytree(ROOT / "numba_atomflow", target / "numba_atomflow", ignore=shutil.ignore_patterns("__pycache__"))
    return target


def test_an_edit_of_a_called_function_recompiles(tmp_path: Path) -> None:
    first, before = record(tmp_path, ONE_KERNEL)
    assert "numba_atomflow.ops.projection.swiglu" in first
    tree = copy_of_the_package(tmp_path / "tree")
    assert record(tmp_path, ONE_KERNEL, tree) == ([], before), "another checkout of the same source compiles"

    kernel_file = tree / "numba_atomflow" / "ops" / "projection.py"
    inner_file = tree / "numba_atomflow" / "ops" / "activation.py"
    untouched = kernel_file.stat()
    source = inner_file.read_text()
    edited = source.replace("def silu(x):", "def silu(x):\n    x = np.float32(2.0) * x", 1)
    assert edited.count("np.float32(2.0) * x") == source.count("np.float32(2.0) * x") + 1
    inner_file.write_text(edited)

    again, after = record(tmp_path, ONE_KERNEL, tree)
    assert "numba_atomflow.ops.projection.swiglu" in again
    assert after > 1.05 * before  # silu(4) instead of silu(2)
    assert kernel_file.stat() == untouched  # numba, which checks only this file, would not recompile
    assert record(tmp_path, ONE_KERNEL, tree) == ([], after)

    # The code of the state before is kept: going back to it compiles nothing.
    inner_file.write_text(source)
    os.utime(inner_file)
    assert record(tmp_path, ONE_KERNEL, tree) == ([], before)


@pytest.mark.slow
def test_damaged_compiled_code_is_compiled_again(tmp_path: Path) -> None:
    first, result = record(tmp_path, ONE_KERNEL)
    (index,) = tmp_path.rglob("projection.swiglu*.nbi")
    (code,) = tmp_path.rglob("projection.swiglu*.nbc")
    for damaged, left in ((code, 100), (index, 0)):  # a disk that was full, a power cut
        damaged.write_bytes(damaged.read_bytes()[:left])
        assert record(tmp_path, ONE_KERNEL) == (first, result)
        assert record(tmp_path, ONE_KERNEL) == ([], result)


def test_a_full_disk_disables_the_cache_only(tmp_path: Path) -> None:
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"  # bytes a file may have
    full += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    for _ in range(2):
        compiled, result = record(tmp_path, full + ONE_KERNEL)
        assert "numba_atomflow.ops.projection.swiglu" in compiled
        assert result > 1


def test_a_cache_deleted_during_pruning_is_not_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "compiled"
    folder.mkdir()
    (folder / "cpu-gone").symlink_to(tmp_path / "nowhere")
    _, result = record(tmp_path, ONE_KERNEL)
    assert result > 1
