"""After any failure while an engine is created on a GPU, all memory is freed and the process goes on.

`tests/cpu/test_gpu_cleanup.py` is the same over a driver that is only pretended, and looks into more corners.
"""

import gc
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from device_launch import capability
from gpu_runners import make_runner
from tiny_models import tiny_geometry

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.backends.base import Decode
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.device import driver
from numba_atomflow.errors import AtomFlowError, BackendError

SMALL = tiny_geometry(layers=1)
PROMPT, PARAMS = [5, 6, 7], SamplingParams(max_tokens=8, ignore_eos=True)
CYCLES = 200


class Watched:
    """The bindings; counts their calls, and can make each fail."""

    def __init__(self, bindings: Any) -> None:
        self._bindings = bindings
        self.calls: list[str] = []
        self.behave()

    def behave(self) -> None:
        """Nothing fails any more."""
        self.before: Callable[[int], Any] = lambda _number: None
        self.after: Callable[[int], Any] = lambda _number: None

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._bindings, name)
        if not name.startswith("cu") or name == "cuGetErrorString":
            return found

        def function(*arguments: Any) -> Any:
            number = len(self.calls)
            self.calls.append(name)
            status = self.before(number)
            if status is not None:
                return (status,)
            results = found(*arguments)
            self.after(number)
            return results

        return function


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    found = Watched(driver._bindings())
    monkeypatch.setattr(driver, "_bindings", lambda: found)
    return found


@pytest.fixture(autouse=True)
def _weights_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    array, arrays = RandomModel.array, dict[tuple[Any, str], Any]()

    def remembered(model: RandomModel, name: str) -> Any:
        key = model.geometry, name
        if key not in arrays:
            arrays[key] = array(model, name)
        return arrays[key]

    monkeypatch.setattr(RandomModel, "array", remembered)


def load(decode: Decode = "auto", **options: Any) -> Engine:
    return Engine.random(SMALL, "cuda", 16, decode=decode, **options)


def reply(engine: Engine) -> list[int]:
    engine.reset()
    return engine.generate_tokens(PROMPT, PARAMS).finish().token_ids


def free_bytes(engine: Engine) -> int:
    """Of the whole GPU, in which what other processes take counts, too."""
    if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
        pytest.skip("other processes of pytest-xdist take memory of the GPU beside this one: run this file without -n")
    return int(engine.backend._gpu.free_bytes())  # type: ignore[attr-defined]


def telling(calls: list[str]) -> list[int]:
    """Numbers of the calls to fail at: of all that have the same neighbours the first and the last."""
    ways = [tuple(calls[max(i - 1, 0) : i + 2]) for i in range(len(calls))]
    return sorted({ways.index(way) for way in ways} | {len(ways) - 1 - ways[::-1].index(way) for way in ways})


@pytest.mark.parametrize("make", [load, partial(make_runner, SMALL)], ids=["engine", "sandbox"])
@pytest.mark.parametrize("failure", ["every call interrupted", "out of memory", "Ctrl-C before", "Ctrl-C after"])
def test_a_failure_at_any_call_of_the_driver(watched: Watched, make: Callable[[], Any], failure: str) -> None:
    from cuda.bindings.driver import CUresult

    with load() as beside:
        expected = reply(beside)
        make().close()
        first = len(watched.calls)
        resource = make()
        calls = watched.calls[first:]
        resource.close()
        free = free_bytes(beside)
        for at in range(len(calls)) if failure.startswith("every") else telling(calls):
            number = len(watched.calls) + at

            def fail(current: int, number: int = number) -> Any:
                if current != number:
                    return None
                if failure == "out of memory":
                    return CUresult.CUDA_ERROR_OUT_OF_MEMORY
                if failure.startswith("every"):
                    raise KeyboardInterrupt
                signal.raise_signal(signal.SIGINT)
                return None

            if failure == "Ctrl-C after":
                watched.after = fail
            else:
                watched.before = fail
            with suppress(BackendError, KeyboardInterrupt):
                make().close()
            watched.behave()
        # A graph whose destruction failed is left, some kilobytes; the driver takes memory by 2 MB.
        assert free - free_bytes(beside) <= 2 << 20
        assert reply(beside) == expected
    with load() as engine:
        assert reply(engine) == expected


class Ways:
    """Ways in which an engine comes to its end."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched
        self.random = random.Random(0)

    def all(self) -> list[Callable[[], None]]:
        return [
            *(self.close_it, self.use_it, self.forget_it, self.refuse_an_option, self.ask_for_too_much),
            *(self.interrupt_progress, self.interrupt_a_call, self.serve),
        ]

    def close_it(self) -> None:
        load(self.random.choice(["auto", "graph"])).close()

    def use_it(self) -> None:
        with load() as engine:
            next(engine.generate_tokens(PROMPT, PARAMS))  # steps are queued ahead

    def forget_it(self) -> None:
        engine = load()
        engine.feed(PROMPT)
        del engine
        gc.collect()

    def refuse_an_option(self) -> None:
        Engine.random(tiny_geometry(post_norm=True), "cuda", 16, decode="persistent")

    def ask_for_too_much(self) -> None:
        Engine.random(tiny_geometry(layers=40, kv_heads=4, max_positions=10**9), "cuda", 10**8)

    def interrupt_progress(self) -> None:
        def progress(_what: str, _done: int, _total: int) -> None:
            raise KeyboardInterrupt

        load(progress=progress)

    def interrupt_a_call(self) -> None:
        number = len(self.watched.calls) + self.random.randrange(200)
        self.watched.after = lambda current: signal.raise_signal(signal.SIGINT) if current == number else None
        try:
            load().close()
        finally:
            self.watched.behave()

    def serve(self) -> None:
        make_runner(SMALL).close()


def test_cycles_in_random_order_bring_all_memory_back(watched: Watched) -> None:
    ways = Ways(watched)
    with load() as beside:
        expected, free = reply(beside), 0
        first = ways.all() * 2
        for cycle in range(len(first) + CYCLES):
            if cycle == len(first):  # what the driver keeps for itself it has by now
                free = free_bytes(beside)
            way = first[cycle] if cycle < len(first) else ways.random.choice(first)
            with suppress(AtomFlowError, KeyboardInterrupt):
                way()
        assert free_bytes(beside) == free
        assert reply(beside) == expected


def test_an_engine_collected_during_a_capture(watched: Watched) -> None:
    for moment in ("cuStreamBeginCapture", "cuLaunchKernelEx", "cuGraphInstantiate"):
        forgotten = [load()]
        forgotten[0].feed(PROMPT)

        def collect(number: int, moment: str = moment, forgotten: list[Engine] = forgotten) -> None:
            if watched.calls[number] == moment:
                forgotten.clear()
                gc.collect()

        watched.after = collect
        with load() as engine:
            assert not forgotten
            assert len(reply(engine)) == PARAMS.max_tokens
        watched.behave()


@pytest.mark.parametrize("program", ["refused_run.py", "forked_run.py"])
def test_in_a_process_of_its_own(program: str) -> None:
    if program == "refused_run.py" and capability() < (9, 0):
        pytest.skip("this GPU refuses the persistent kernel anyway")
    path = Path(__file__).with_name(program)
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all is well\n"), done.stdout + done.stderr
