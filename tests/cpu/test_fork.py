"""Kernels in forked processes: they work, or raise; numba's OpenMP layer would end the process."""

import os
import sys
import threading
from pathlib import Path

import numba
import numpy as np
import pytest
from child_processes import run
from cli_runner import environment
from tiny_models import tiny_geometry

from numba_atomflow import Engine, home
from numba_atomflow.errors import BackendError
from numba_atomflow.host.pool import own_pool
from numba_atomflow.memory.arena import HostArena
from numba_atomflow.memory.plan import Buffer, plan_memory
from numba_atomflow.ops.bandwidth import total
from numba_atomflow.ops.fp8 import quantize_groups
from numba_atomflow.ops.rms_norm import rms_norm
from numba_atomflow.utils.exclusive_calls import ExclusiveCalls

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

REFUSED, WORKED = 11, 12

FORK_FIRST = """
import os, numpy as np
from numba_atomflow.utils.exclusive_calls import ExclusiveCalls
from numba_atomflow.host.pool import own_pool
from numba_atomflow.ops.bandwidth import total
pid = os.fork()
if pid == 0:
    os._exit(int(total(np.ones(12, np.float32))))
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(total(np.ones(5, np.float32))))
"""


def use_kernel(name: str) -> None:
    ones = np.ones((1, 128), np.float32)
    match name:
        case "total":
            total(ones[0])
        case "quantize":
            quantize_groups(ones)
        case "rms_norm":  # perhaps never compiled before
            rms_norm(ones, ones[0], np.float32(1e-6), np.empty_like(ones))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 warns of what this is about
@pytest.mark.parametrize("kernel", ["total", "quantize", "rms_norm"])
def test_a_kernel_in_a_child_of_a_process_that_ran_kernels_works_or_raises(kernel: str) -> None:
    total(np.ones(3, np.float32))
    lost = own_pool() is None and sys.platform == "linux" and numba.threading_layer() == "omp"
    if (pid := os.fork()) == 0:
        code = 1
        try:
            use_kernel(kernel)
            code = WORKED
        except BackendError as error:
            code = REFUSED if "forked" in str(error) else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (REFUSED if lost else WORKED)
    use_kernel(kernel)  # the parent's kernels are as they were


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_has_a_kv_cache_of_its_own() -> None:
    arena = HostArena(plan_memory([Buffer("kv cache", "keys", (4,), "float32")]))
    cache = arena["keys"].host_array()
    cache[:] = 1
    if (pid := os.fork()) == 0:
        cache[:] += 1
        os._exit(int(cache[0]))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    assert cache[0] == 1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_engine_goes_on_in_a_child_and_in_the_parent() -> None:
    with Engine.random(tiny_geometry(), "cpu", 32) as engine:
        engine.feed([5, 6, 7])
        expected = engine.feed([8])
        engine.rewind(3)
        lost = own_pool() is None and sys.platform == "linux" and numba.threading_layer() == "omp"
        if (pid := os.fork()) == 0:
            code = 1
            try:
                code = WORKED if np.array_equal(engine.feed([8]), expected) else 1
            except BackendError as error:
                code = REFUSED if "forked" in str(error) else 1
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (REFUSED if lost else WORKED)
        assert engine.position == 3
        np.testing.assert_array_equal(engine.feed([8]), expected)


def test_a_process_that_forks_before_its_first_kernel_has_children_that_work(tmp_path: Path) -> None:
    (tmp_path / "compiled").symlink_to(home.compiled().resolve())
    completed = run(
        [sys.executable, "-W", "ignore", "-c", FORK_FIRST],
        env=environment(tmp_path),
        text=True,
    )
    assert (completed.returncode, completed.stdout) == (0, "12 5\n"), completed.stderr


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_call_of_another_thread_does_not_block_the_child() -> None:
    """The thread does not exist in the child, so closing must not wait for it."""
    calls, inside, leave = ExclusiveCalls(), threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: calls.run(lambda: inside.set() or leave.wait(60)))
    thread.start()
    assert inside.wait(60)
    if (pid := os.fork()) == 0:
        calls.wait_and_run(lambda: None)
        os._exit(calls.run(lambda: WORKED))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    leave.set()
    thread.join()
    assert code == WORKED


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_engine_whose_memory_is_on_a_gpu_belongs_to_one_process() -> None:
    calls = ExclusiveCalls(survives_fork=False)
    assert calls.run(lambda: WORKED) == WORKED
    if (pid := os.fork()) == 0:
        calls.wait_and_run(lambda: os._exit(1))  # closing: nothing is done
        try:
            calls.run(lambda: None)
        except BackendError:
            os._exit(REFUSED)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == REFUSED
    assert calls.run(lambda: WORKED) == WORKED
