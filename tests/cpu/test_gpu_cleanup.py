"""After any failure while an engine is created on a GPU, or closed, everything is freed and the process goes on.

Over a driver that is only pretended, call by call; `tests/gpu/test_cleanup.py` is the same on a GPU.
"""

import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from types import CodeType, FrameType
from typing import Any

import pytest
from gpu_runners import make_runner
from numpy.typing import NDArray
from pretended_gpu import PretendedDriver, Status, pretend_compiler
from tiny_models import tiny_geometry

from numba_atomflow import Engine
from numba_atomflow.backends.base import Decode
from numba_atomflow.backends.choose import gpu_is_usable
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.device import driver, resources
from numba_atomflow.device.driver import open_device
from numba_atomflow.device.resources import DeviceResources
from numba_atomflow.errors import BackendError, CheckpointError, ClosedError
from numba_atomflow.model.step import SAMPLE
from numba_atomflow.sandbox.gpu_runner import GpuRunner
from numba_atomflow.utils import interrupts
from numba_atomflow.utils.interrupts import deferred_interrupts

pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
pytest.importorskip("numba_cuda", reason="the CUDA backend needs it; there is none for macOS")

RANDOM_ARRAY = RandomModel.array
SMALL = tiny_geometry(layers=1)
UNDOING = ("cuGraphExecDestroy", "cuModuleUnload", "cuMemFree", "cuMemFreeHost", "cuStreamDestroy")


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_compiler(monkeypatch)


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts() -> Iterator[None]:
    """At the start of every test, and again after one that sets another handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _weights_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RandomModel, "array", lambda _self, name: weights()[name])


@cache
def weights() -> dict[str, NDArray[Any]]:
    model = RandomModel(SMALL)
    return {name: RANDOM_ARRAY(model, name) for name in model.names()}


def load(decode: Decode = "graph", **options: Any) -> Engine:
    return Engine.random(SMALL, "cuda", 1, decode=decode, **options)


MAKERS: dict[str, Callable[[], Engine | GpuRunner]] = {
    "graph": load,
    "persistent": partial(load, "persistent"),
    "sandbox": partial(make_runner, SMALL),
}


class Failure:
    """Happens at the call with one number."""

    def __init__(self, raised: type[BaseException] | None = None, status: Status | None = None) -> None:
        self.raised, self.status, self.at = raised, status, -1

    def __call__(self, number: int, _name: str) -> Status | None:
        if number != self.at:
            return None
        if self.raised:
            raise self.raised("it went wrong")
        if self.status is None:
            signal.raise_signal(signal.SIGINT)
        return self.status


LOST = "the GPU failed"  # then to the whole process
EVERYWHERE = "interrupted"  # not only at telling calls
AFTERWARDS = "Ctrl-C afterwards"  # when the call has had its effect
FAILURES = {
    "out of memory": (Failure(status=Status.CUDA_ERROR_OUT_OF_MEMORY), BackendError),
    LOST: (Failure(status=Status.CUDA_ERROR_ILLEGAL_ADDRESS), BackendError),
    "no memory on the host": (Failure(MemoryError), MemoryError),
    EVERYWHERE: (Failure(KeyboardInterrupt), KeyboardInterrupt),
    "Ctrl-C": (Failure(), KeyboardInterrupt),
    AFTERWARDS: (Failure(), KeyboardInterrupt),
}


def telling(calls: list[str]) -> list[int]:
    """Numbers of the calls to fail at: of all that have the same neighbours the first and the last."""
    ways = [tuple(calls[max(i - 1, 0) : i + 2]) for i in range(len(calls))]
    return sorted({ways.index(way) for way in ways} | {len(ways) - 1 - ways[::-1].index(way) for way in ways})


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(
    ("failure", "beside"),
    [(LOST, False), ("Ctrl-C", False), *((failure, True) for failure in FAILURES if failure != LOST)],
    ids=lambda value: value if isinstance(value, str) else "beside" if value else "alone",
)
def test_a_failure_at_any_call_of_the_driver_leaves_nothing_behind(
    pretended: PretendedDriver, maker: str, failure: str, beside: bool
) -> None:
    make, (fail, expected) = MAKERS[maker], FAILURES[failure]
    other = load() if beside else None
    alive, first = dict(pretended.live), len(pretended.calls)
    resource = make()
    calls = pretended.calls[first:]
    resource.close()
    assert pretended.live == alive
    for at in telling(calls) if failure != EVERYWHERE else range(len(calls)):
        fail.at = len(pretended.calls) + at
        if failure == AFTERWARDS:
            pretended.after = fail
        else:
            pretended.before = fail
        try:
            make().close()
        except expected:
            pass
        else:  # where something temporary is freed
            assert calls[at] in ("cuCtxPopCurrent", "cuGraphDestroy"), calls[at]
        pretended.behave()
        if calls[at] == "cuCtxPopCurrent":
            pretended.stack().clear()
        pretended.assert_used_well()
        left = [handle for handle in pretended.live if handle not in alive]
        assert len(left) <= (calls[at] == "cuGraphDestroy"), (at, calls[at], pretended.live)  # which was not destroyed
        for handle in left:
            del pretended.live[handle]
        assert pretended.live == alive
    make().close()
    assert pretended.live == alive
    if other:
        other.close()


# --- Ctrl-C between any two instructions -----------------------------------------------------------------------------


def use_the_gpu() -> None:
    with DeviceResources() as owner:
        owner.open()
        with owner.current():
            stream = owner.resources.stream()
            owner.resources.call("cuMemAlloc", 64, undo="cuMemFree")
            with owner.resources.scope(stream) as inner:
                inner.call("cuMemAlloc", 64, undo="cuMemFree")


class AtInstruction:
    """Calls `action` before one instruction of the code that owns things; remembers all that it passed."""

    FILES = frozenset(module.__file__ for module in (driver, interrupts, resources, contextlib))

    def __init__(self, at: int, action: Callable[[], None]) -> None:
        self.at, self.action = at, action
        self.passed: list[tuple[CodeType, int]] = []

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if frame.f_code.co_filename not in self.FILES:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self.passed.append((frame.f_code, frame.f_lasti))
            if len(self.passed) - 1 == self.at:
                sys.settrace(None)
                self.action()
        return self


def traced(at: int, make: Callable[[], None]) -> AtInstruction:
    before, tracer = sys.gettrace(), AtInstruction(at, partial(signal.raise_signal, signal.SIGINT))
    sys.settrace(tracer)
    try:
        make()
    finally:
        sys.settrace(before)
    return tracer


@pytest.fixture
def _quick_collection() -> Iterator[None]:
    """What the suite holds so far is no garbage: it is not looked at."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ctrl-C while one is collected
@pytest.mark.usefixtures("_quick_collection")
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another owner"])
def test_ctrl_c_between_any_two_instructions_leaves_nothing_behind(pretended: PretendedDriver, beside: bool) -> None:
    with DeviceResources() as other:
        if beside:
            other.open()
        alive = dict(pretended.live)
        passed = traced(-1, use_the_gpu).passed
        ends = {instruction: number for number, instruction in enumerate(passed)}  # where it is passed last
        for at in ends.values():
            with suppress(KeyboardInterrupt):
                traced(at, use_the_gpu)
            gc.collect()
            assert pretended.live == alive, passed[at]
            pretended.assert_used_well()


# --- clean-up that fails, comes twice, late, or in the wrong process -------------------------------------------------


@pytest.mark.parametrize("failure", [name for name in FAILURES if "Ctrl-C" not in name])
def test_what_fails_while_closing_keeps_nothing_else_from_being_given_back(
    pretended: PretendedDriver, failure: str
) -> None:
    fail, expected = FAILURES[failure]
    with load():
        alive = dict(pretended.live)
        engine = load()
        first = len(pretended.calls)
        engine.close()
        calls = pretended.calls[first:]
        for at in telling(calls):
            engine = load()
            fail.at = len(pretended.calls) + at
            pretended.before = fail
            with suppress(expected):
                engine.close()
            pretended.behave()
            engine.close()
            left = [handle for handle in pretended.live if handle not in alive]
            undone = calls[at] in UNDOING
            assert len(left) <= undone or calls[at] == "cuCtxPushCurrent", (calls[at], left)
            for handle in left:
                del pretended.live[handle]
            if calls[at] == "cuCtxPopCurrent":
                pretended.stack().clear()
            pretended.assert_used_well()


def test_a_refusal_with_a_clean_up_that_fails_as_well_is_told_as_the_refusal(pretended: PretendedDriver) -> None:
    def before(_number: int, name: str) -> None:
        if name == "cuGraphUpload":
            raise BackendError("refused")
        if name == "cuMemFree":
            raise MemoryError

    pretended.before = before
    with pytest.raises((BackendError, MemoryError)) as caught:
        load()
    assert "refused" in str(caught.value) or "refused" in str(caught.value.__context__)
    assert pretended.counts() == {}
    pretended.behave()
    load().close()


@pytest.mark.parametrize("raised", [KeyboardInterrupt, RuntimeError])
def test_an_exception_of_the_progress_callback(pretended: PretendedDriver, raised: type[BaseException]) -> None:
    seen: list[str] = []

    def progress(what: str, _done: int, _total: int) -> None:
        seen.append(what)
        raise raised

    with pytest.raises(raised):
        load(progress=progress)
    assert len(seen) == 1
    assert pretended.counts() == {}


def test_weights_that_are_missing_or_damaged(pretended: PretendedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RandomModel, "codes", lambda _self, _name: None)  # as a checkpoint's, read one by one
    for at in range(len(weights())):
        arrays = iter(range(1000))

        def array(_self: Any, name: str, at: int = at, arrays: Iterator[int] = arrays) -> NDArray[Any]:
            if next(arrays) == at:
                raise CheckpointError("damaged")
            return weights()[name]

        monkeypatch.setattr(RandomModel, "array", array)
        with pytest.raises(CheckpointError):
            load()
        assert pretended.counts() == {}


def test_options_that_are_refused(pretended: PretendedDriver) -> None:
    """The case that used to end the process: the finaliser of a refused engine came to a context that was gone."""
    for geometry in (tiny_geometry(post_norm=True), tiny_geometry(heads=18, kv_heads=2)):
        with pytest.raises(BackendError, match="--decode persistent is not possible"):
            Engine.random(geometry, "cuda", decode="persistent")
        gc.collect()
        assert pretended.counts() == {}
        pretended.assert_used_well()


def test_auto_says_that_the_gpu_is_there_but_too_small(pretended: PretendedDriver) -> None:
    assert gpu_is_usable()
    assert pretended.counts() == {}
    pretended.free_bytes = 1 << 20
    with pytest.raises(BackendError, match=r"needs .* GB on the GPU .*only .* are free; .*--backend cpu"):
        Engine.random(SMALL)
    assert pretended.counts() == {}


def test_an_engine_that_is_not_closed_is_freed_when_collected_or_at_exit(pretended: PretendedDriver) -> None:
    engine = load()
    del engine
    gc.collect()
    assert pretended.counts() == {}
    engine = load()
    engine.backend._owner._finalizer()  # type: ignore[attr-defined]  what the interpreter calls at its end
    assert pretended.counts() == {}
    engine.close()
    engine.close()


@pytest.mark.usefixtures("_quick_collection")
def test_an_engine_collected_while_another_is_captured_or_the_gpu_is_opened(pretended: PretendedDriver) -> None:
    for moment in ("cuStreamBeginCapture", "cuLaunchKernelEx", "cuInit"):
        forgotten = [load()]
        if moment == "cuInit":
            driver._open_devices.clear()  # as after a failure of the GPU

        def collect(_number: int, name: str, moment: str = moment, forgotten: list[Engine] = forgotten) -> None:
            if name == moment:
                forgotten.clear()
                gc.collect()

        pretended.after = collect
        with load():
            assert not forgotten
            assert pretended.counts()["memory"] == pretended.counts()["context"] == 1
        pretended.behave()
        assert pretended.counts() == {}


def test_a_backend_that_is_closed_says_so(pretended: PretendedDriver) -> None:
    with load():  # the context stays
        backend = load().backend
        backend.close()
        uses: list[Callable[[], object]] = [
            lambda: backend.prefill([1], SAMPLE),
            backend.decode,
            backend.sampled_tokens,
            lambda: backend.seek(1),
            lambda: backend.logits(0, 1),
        ]
        for use in uses:
            with pytest.raises(ClosedError, match="given back; load the model again"):
                use()
    assert pretended.misuses == []


def test_a_forked_child_touches_nothing_of_its_parent(
    pretended: PretendedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, parent = load(), os.getpid()
    live, calls = dict(pretended.live), len(pretended.calls)
    backend = engine.backend
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    with pytest.raises(BackendError, match="before this process was forked"):
        engine.feed([1])
    with pytest.raises(BackendError, match="before this process was forked"):
        open_device()
    assert not gpu_is_usable()
    engine.close()
    assert len(pretended.calls) == calls
    assert pretended.live == live
    monkeypatch.undo()
    pretended.live.clear()  # in the parent it would have been closed
    del backend


def test_replays_in_flight_are_waited_for(pretended: PretendedDriver) -> None:
    engine = load("persistent")
    engine.backend.prefill([1], SAMPLE)
    engine.close()  # the pretended driver reports what is freed while the GPU works
    assert pretended.counts() == {}


# --- Ctrl-C that waits -----------------------------------------------------------------------------------------------


def test_ctrl_c_comes_at_the_end_of_the_outermost_block() -> None:
    reached = []

    def run() -> None:
        with deferred_interrupts():
            with deferred_interrupts():
                signal.raise_signal(signal.SIGINT)
                reached.append("inner")
            reached.append("outer")
        reached.append("behind")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert reached == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_and_other_handlers_are_left_alone() -> None:
    def block() -> None:
        with deferred_interrupts():
            found.append(signal.getsignal(signal.SIGINT))

    found: list[Any] = []
    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
    for handler in (signal.SIG_IGN, signal.SIG_DFL):
        signal.signal(signal.SIGINT, handler)
        block()
        assert found[-1] == signal.getsignal(signal.SIGINT) == handler
