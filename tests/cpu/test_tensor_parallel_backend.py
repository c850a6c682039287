"""The backend of several GPUs over a driver that is only pretended: what it loads, launches, refuses and frees."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pretended_gpu import PretendedDriver, Status, pretend_compiler
from tiny_models import tiny_geometry

pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
pytest.importorskip("numba_cuda", reason="the CUDA backend needs it; there is none for macOS")

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.backends.base import Memory, Verification
from numba_atomflow.backends.cuda.queue import TokenRing
from numba_atomflow.backends.cuda.tensor_parallel import columns, rank
from numba_atomflow.backends.cuda.tensor_parallel.backend import TensorParallelBackend
from numba_atomflow.backends.cuda.tensor_parallel.timeline import compare_clocks, merged
from numba_atomflow.backends.cuda.wide_sampling import WideSampling
from numba_atomflow.checkpoint.random_weights import POOL_BYTES, RandomModel
from numba_atomflow.errors import AtomFlowError, BackendError, CheckpointError, ClosedError, OptionError
from numba_atomflow.memory.kv_cache import layer_cache
from numba_atomflow.memory.view import View
from numba_atomflow.model.step import NO_LOGITS, SAMPLE, Attention, Op
from numba_atomflow.ops.cuda.layout.prepack import prepack_arguments
from numba_atomflow.ops.cuda.persistent.schedule import ATTENTION, OPS_PER_LAYER
from numba_atomflow.ops.cuda.persistent.trace import DONE, EVENTS, STAGED
from numba_atomflow.ops.cuda.persistent.wide_vectors import ABSENT
from numba_atomflow.ops.cuda.runtime.launch import Launch
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY
from numba_atomflow.perf.profile import profile
from numba_atomflow.sampling import Sampler

SMALL = tiny_geometry(layers=1, hidden=256, heads=8, kv_heads=4, vocabulary=300)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedDriver]:
    """A machine with four GPUs."""
    pretend_compiler(monkeypatch)
    machine = PretendedDriver().install(monkeypatch)
    machine.gpus = 4
    yield machine
    machine.assert_used_well()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Kernels launched, each with its stream."""
    launches: list[tuple[str, Any]] = []
    run = Launch.run

    def recorded(self: Launch) -> None:
        launches.append((self.kernel.spec.name, int(self._config.hStream)))
        run(self)

    monkeypatch.setattr(Launch, "run", recorded)
    return launches


def load(gpus: Any, geometry: Any = SMALL) -> Engine:
    return Engine.random(geometry, "cuda", 32, gpus=gpus)


@pytest.mark.parametrize("gpus", [2, 4, "all", [3, 1], [0, 0]], ids=str)
def test_an_engine_on_several_gpus(pretended: PretendedDriver, gpus: Any) -> None:
    with load(gpus) as engine:
        backend = engine.backend
        assert isinstance(backend, TensorParallelBackend)
        ranks = len(gpus) if isinstance(gpus, list) else 4 if gpus == "all" else gpus
        assert backend.device == f"{ranks} x Pretended GPU, CUDA 13.0"
        assert pretended.counts()["context"] == len(set(gpus) if isinstance(gpus, list) else range(ranks))
        assert pretended.counts()["memory"] == ranks
        assert engine.feed([1, 2, 3]).shape == (300,)
        assert engine.feed([4, 5], all_logits=True).shape == (2, 300)
        engine.rewind(1)
        engine.reset()
    assert not pretended.live
    with pytest.raises(ClosedError):
        backend.prefill([1], NO_LOGITS)


def test_every_rank_launches_every_step(pretended: PretendedDriver, launched: list[tuple[str, Any]]) -> None:
    with load(2) as engine:
        backend = engine.backend
        streams = [handle for handle, (kind, _) in pretended.live.items() if kind == "stream"]
        launched.clear()
        backend.prefill([7], NO_LOGITS)
        assert launched == [("persistent_rank", stream) for stream in streams]
        launched.clear()
        backend.prefill([7], SAMPLE)
        assert launched == [("persistent_rank", stream) for stream in streams], "the most likely token: one launch each"
        assert not hasattr(pretended.launched[-1], "cooperative")
        backend._steps.greedy = False
        launched.clear()
        backend.prefill([7], SAMPLE)
        names = ("persistent_rank", "sample", "advance_sampled")
        assert launched == [(name, stream) for stream in streams for name in names]


# --- several tokens in a step ----------------------------------------------------------------------------------------


def streams_of(pretended: PretendedDriver) -> list[int]:
    """One for each rank."""
    return [handle for handle, (kind, _) in pretended.live.items() if kind == "stream"]


def steps_of(launched: list[tuple[str, Any]], stream: int) -> list[str]:
    """Kernels that were launched in a stream."""
    return [name for name, of in launched if of == stream]


def test_a_prompt_takes_eight_tokens_a_step(pretended: PretendedDriver, launched: list[tuple[str, Any]]) -> None:
    """Rests of 2 to 8 are padded, a single token is a decode step; what the reply begins with follows the last one."""
    with load(2) as engine:
        assert engine.backend.prefill_chunk == 8
        assert engine.backend.prompt_lengths == [1, 2, 4, 8]
        sampled = ["argmax", "sample", "advance_sampled"]
        for tokens, head, expected in (
            (11, NO_LOGITS, ["x8", "x4"]),
            (11, SAMPLE, ["x8", "x4", *sampled]),
            (9, NO_LOGITS, ["x8", ""]),
            (5, NO_LOGITS, ["x8"]),
            (2, SAMPLE, ["x2", *sampled]),
        ):
            engine.reset()
            launched.clear()
            engine._open_context().prefill([*range(1, tokens + 1)], head)
            names = [f"persistent_rank_{x}".rstrip("_") if x[:1] in ("x", "") else x for x in expected]
            for stream in streams_of(pretended):
                assert steps_of(launched, stream) == names, (tokens, head)
            assert engine.backend._queue.position == tokens
        engine.backend.start(Sampler(SamplingParams(logprobs=1), 300, ()))
        launched.clear()
        engine.backend.prefill([1, 2, 3], SAMPLE)
        assert steps_of(launched, streams_of(pretended)[1])[1:] == ["argmax", "sample", "logprobs", "advance_sampled"]


def test_the_tokens_of_a_step_are_padded(pretended: PretendedDriver) -> None:
    with load(2) as engine:
        engine.backend.prefill([7, 8, 9], NO_LOGITS)
        for rank_ in engine.backend._ranks:
            step = rank_.buffers["verify.step"].host_array()
            assert step[2:].view(np.int32)[:4].tolist() == [7, 8, 9, 9]
        assert engine.backend.logits(1, 3).shape == (2, 300)
        with pytest.raises(IndexError):
            engine.backend.logits(0, 4)
        with pytest.raises(IndexError):
            engine.backend.prefill([1] * 9, NO_LOGITS)


def test_kernels_of_several_tokens_are_loaded_when_they_are_needed_and_nothing_runs(pretended: PretendedDriver) -> None:
    """Those of a prompt one by one; those of steps that verify together."""
    with load(2) as engine:
        streams, opened = len(streams_of(pretended)), list[int]()

        @contextmanager
        def bar() -> Iterator[None]:
            opened.append(1)
            yield

        engine.backend.show_compiling(bar)

        def loads() -> tuple[int, list[str]]:
            """Modules that a call has loaded, and the calls before the first of them."""
            first = pretended.calls.index("cuModuleLoadData") if "cuModuleLoadData" in pretended.calls else 0
            found = pretended.calls.count("cuModuleLoadData"), pretended.calls[:first]
            pretended.calls.clear()
            return found

        pretended.calls.clear()
        engine.feed([1])
        assert loads()[0] == 0
        engine.feed([1, 2, 3])
        count, before = loads()
        assert count == streams
        assert before.count("cuStreamSynchronize") >= streams
        assert opened
        engine.feed([1, 2, 3, 4])
        assert loads()[0] == 0
        engine.backend.verify([1])
        assert loads()[0] == 0
        engine.backend.verify([1, 2])
        count, before = loads()
        assert count == 2 * streams + 3, "those of 2 and 8 tokens, and of one rank what samples from several rows"
        assert before.count("cuStreamSynchronize") >= streams


NOT_FINITE = 1 << 31


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What every rank posts as the most likely tokens of steps that verify."""
    posted: list[int] = []
    verify = columns.RankColumns.verify

    def verify_and_post(self: columns.RankColumns, tokens: int) -> None:
        verify(self, tokens)
        self.choices.array[: len(posted)] = [1 << 32 | token for token in posted]

    monkeypatch.setattr(columns.RankColumns, "verify", verify_and_post)
    return posted


def test_steps_that_verify_leave_the_position(
    pretended: PretendedDriver, launched: list[tuple[str, Any]], chosen: list[int]
) -> None:
    with load(2) as engine:
        backend = engine.backend
        assert backend.verification == Verification(8, automatic=False)
        engine.feed([1, 2, 3, 4, 5])
        for count, kernel in ((1, "persistent_rank"), (2, "persistent_rank_x2"), (7, "persistent_rank_x8")):
            tokens = [*range(10, 10 + count)]
            launched.clear()
            assert backend.verify(tokens).shape == (count, 300)
            assert launched == [(kernel, stream) for stream in streams_of(pretended)]
            for rank_ in backend._ranks:
                step = rank_.buffers["verify.step"].host_array()
                assert step[:2].tolist() == [5, 0]
                assert step[2:].view(np.int32)[:count].tolist() == tokens
            assert backend._queue.position == 5
        chosen[:] = [11, 12, 99, 14]
        assert backend.verify_greedy([10, 11, 12, 13]) == [11, 12, 99]
        assert backend.verify_greedy([10]) == [11]
        with pytest.raises(IndexError):
            backend.verify([1] * 9)
        with pytest.raises(IndexError):
            backend.verify_greedy([300])
        engine.rewind(0)
        engine.feed([1] * 30)
        with pytest.raises(IndexError):
            backend.verify([1, 2, 3])


def test_proposals_are_checked_where_it_is_asked_for(pretended: PretendedDriver, chosen: list[int]) -> None:
    chosen[:] = [5] * 8
    with load(2) as engine:
        params = SamplingParams(max_tokens=12, speculate="lookup", ignore_eos=True)
        reply = engine.generate_tokens([5, 5, 5, 5], params).finish()
        assert reply.token_ids[1:] == [5] * 11, "the first comes from the prompt's logits"
        assert 0 < reply.stats.accepted <= reply.stats.proposed


def test_the_first_rank_samples_from_steps_that_verify(
    monkeypatch: pytest.MonkeyPatch, pretended: PretendedDriver, launched: list[tuple[str, Any]], chosen: list[int]
) -> None:
    """Their tokens are read up to the first that was not proposed; NaN in what the kernel posts is a watchdog's."""
    sampled = [11, 12, 99, 14]
    monkeypatch.setattr(WideSampling, "posted", lambda _self, row: 1 << 32 | sampled[row])
    with load(2) as engine:
        backend, (first, second) = engine.backend, streams_of(pretended)
        backend.start(Sampler(SamplingParams(temperature=1.0, seed=5), 300, ()))
        backend.seek(3)
        launched.clear()
        assert backend.launch_verification([10, 11, 12, 13], sampled=True)() == [11, 12, 99]
        rows = ["argmax_rows", "sample_rows", "post_rows"]
        assert steps_of(launched, first) == ["persistent_rank_x4", *rows]
        assert steps_of(launched, second) == ["persistent_rank_x4"]
        launched.clear()
        assert backend.launch_verification([10], sampled=True)() == [11]
        assert steps_of(launched, first) == ["persistent_rank", *rows]
        assert backend._queue.position == 3
        chosen[:] = [11, NOT_FINITE]
        backend._ranks[1].buffers["persistent.fault"].host_array()[:] = 1
        with pytest.raises(BackendError, match="watchdog"):
            backend.launch_verification([10, 11], sampled=True)()


@pytest.mark.parametrize("method", ["verify", "verify_greedy"])
def test_logits_that_are_not_finite_may_be_of_a_watchdog(
    pretended: PretendedDriver, chosen: list[int], method: str
) -> None:
    """On any rank. All ranks then begin anew: other epochs, and vectors of no step."""
    chosen[:] = [11, NOT_FINITE]
    with load(2) as engine:
        backend, ranks = engine.backend, engine.backend._ranks
        verify = getattr(backend, method)
        if method == "verify":
            assert verify([10, 11]).shape == (2, 300), "the caller sees what they are"
        else:
            with pytest.raises(CheckpointError):
                verify([10, 11])
        engine.reset()
        ranks[1].buffers["persistent.fault"].host_array()[:] = 1
        ranks[1].buffers["verify.steps_x4"].host_array()[:] = 7, 3
        ranks[0].buffers["verify.vectors_x2"].host_array()[:] = 5
        with pytest.raises(BackendError, match="watchdog"):
            verify([10, 11])
        engine.reset()
        for rank_ in ranks:
            assert not rank_.buffers["persistent.fault"].host_array().any()
            for name in ("persistent.steps", "verify.steps_x2", "verify.steps_x4", "verify.steps_x8"):
                assert rank_.buffers[name].host_array().tolist() == [8, 0]
            for width in (2, 4, 8):
                assert (rank_.buffers[f"verify.vectors_x{width}"].host_array() == ABSENT).all()
            assert (rank_.buffers["verify.best"].host_array() == LOWEST_KEY).all()


def test_a_prompt_of_several_tokens_shows_that_a_watchdog_tripped(
    monkeypatch: pytest.MonkeyPatch, pretended: PretendedDriver
) -> None:
    monkeypatch.setattr(TokenRing, "receive", lambda _self, _number, _check: 40)
    with load(2) as engine:
        for step in (
            lambda: engine.feed([1, 2, 3]),
            lambda: engine.generate_tokens([1, 2, 3], SamplingParams(max_tokens=1)).finish(),
        ):
            engine.reset()
            engine.backend._ranks[1].buffers["persistent.fault"].host_array()[:] = 1
            with pytest.raises(BackendError, match="watchdog"):
                step()


def test_a_step_that_was_interrupted_is_awaited(
    monkeypatch: pytest.MonkeyPatch, pretended: PretendedDriver, chosen: list[int]
) -> None:
    """It might post its tokens when the next one has begun."""
    with load(2) as engine:

        def interrupt(_stream: Any) -> bool:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("numba_atomflow.backends.cuda.tensor_parallel.verify.stream_finished", interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.backend.verify_greedy([10, 11])
        chosen[:] = [11, 12]
        pretended.calls.clear()
        assert engine.backend.verify_greedy([10, 11]) == [11, 12]
        assert pretended.calls.count("cuStreamSynchronize") == 2


@pytest.mark.parametrize("failing", [1, 3], ids=["second rank", "sampling"])
def test_after_a_step_that_some_ranks_lack_all_begin_anew(
    monkeypatch: pytest.MonkeyPatch, pretended: PretendedDriver, failing: int
) -> None:
    """A rank that waits for one without the step ends by its watchdog, and has counted it."""
    monkeypatch.setattr(WideSampling, "posted", lambda _self, _row: 1 << 32 | 11)
    with load(2) as engine:
        backend, ranks = engine.backend, engine.backend._ranks
        backend.start(Sampler(SamplingParams(temperature=1.0, seed=5), 300, ()))
        backend.verify([10, 11])
        launches = itertools.count()

        def fail(_number: int, name: str) -> Status | None:
            return Status.CUDA_ERROR_UNKNOWN if name == "cuLaunchKernelEx" and next(launches) == failing else None

        pretended.before = fail
        with pytest.raises(AtomFlowError):
            backend.launch_verification([10, 11], sampled=True)
        pretended.behave()
        ranks[0].buffers["verify.steps_x2"].host_array()[:] = 7, 0
        engine.reset()
        for rank_ in ranks:
            assert rank_.buffers["verify.steps_x2"].host_array().tolist() == [8, 0]


def test_timed_steps_that_were_interrupted_are_awaited(
    monkeypatch: pytest.MonkeyPatch, pretended: PretendedDriver, chosen: list[int]
) -> None:
    """They, too, might post their tokens when the next step has begun."""
    with load(2) as engine:
        engine.backend.verify([10, 11])

        def interrupt() -> float:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("numba_atomflow.backends.cuda.tensor_parallel.verify.time.perf_counter", interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.backend.time_widths(1)
        chosen[:] = [11, 12]
        pretended.calls.clear()
        assert engine.backend.verify_greedy([10, 11]) == [11, 12]
        assert pretended.calls.count("cuStreamSynchronize") == 2
        assert sorted(engine.backend.time_widths(1)) == [1, 2, 4, 8]
        pretended.calls.clear()
        assert engine.backend.verify_greedy([10, 11]) == [11, 12]
        assert "cuStreamSynchronize" not in pretended.calls


def test_observers_see_a_token_at_a_time(pretended: PretendedDriver) -> None:
    with load(2) as engine:
        assert engine.backend.observed_chunk == 1
        with pytest.raises(IndexError):
            engine.backend.observe([1, 2], NO_LOGITS, Watching([]))
        assert engine.capture([1, 2, 3, 4, 5, 6, 7, 8, 9], "layer.0.q")["layer.0.q"].shape == (9, 512)
        with engine.edit({"layer.0.attention": lambda rows, position: None}):
            assert engine.backend.prefill_chunk == 1
            assert engine.feed([4, 5]).shape == (300,)


# --- weights and views -----------------------------------------------------------------------------------------------


def read(address: int, nbytes: int) -> np.ndarray:
    """Bytes of the pretended device's memory."""
    return View("bytes", address, (nbytes,), "uint8").host_array().copy()


@pytest.fixture
def prepacked(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Codes and scales, as bytes, that the kernels which prepack find in memory, in turns."""
    staged: list[np.ndarray] = []

    def recorded(layout: Any, spans: Any, target: Any) -> Any:
        staged.extend(read(span.address, span.extent) for span in spans)
        return prepack_arguments(layout, spans, target)

    monkeypatch.setattr("numba_atomflow.ops.cuda.runtime.upload.prepack_arguments", recorded)
    return staged


@pytest.mark.parametrize("positions", [32, 65536], ids=["codes of the host", "codes of the device"])
def test_each_rank_has_its_rows(
    monkeypatch: pytest.MonkeyPatch, pretended: PretendedDriver, prepacked: list[np.ndarray], positions: int
) -> None:
    """Random codes are made on the device where there is room for their pool, which is copied once to each GPU."""
    copied, copy = list[int](), PretendedDriver._cuMemcpyHtoDAsync

    def counted(self: PretendedDriver, address: int, source: int, nbytes: int, stream: int) -> None:
        copied.append(nbytes)
        copy(self, address, source, nbytes, stream)

    monkeypatch.setattr(PretendedDriver, "_cuMemcpyHtoDAsync", counted)
    geometry, model = replace(SMALL, max_positions=positions), RandomModel(SMALL)
    with Engine.random(geometry, "cuda", positions, gpus=2) as engine:
        parts = [name for name, view in engine.backend._ranks[0].weight_views.items() if view.dtype != "float32"]
        sharding = engine.backend._ranks[0].kernels.sharding
    expected = []
    for part in parts:
        for number in range(2):
            for kind in ("weight", "scale"):
                array = model.array(f"{part}.{kind}")
                expected.append(np.concatenate([array[span] for span in sharding.rows(part, number)]))
    assert len(prepacked) == len(expected), "a piece for each matrix"
    for found, rows in zip(prepacked, expected, strict=True):
        np.testing.assert_array_equal(found, rows.reshape(-1).view(np.uint8))
    codes = {rows.nbytes for rows in expected if rows.dtype == np.uint8}
    if positions > 32:
        assert copied.count(POOL_BYTES) == 2
        assert not codes & set(copied)
    else:
        assert POOL_BYTES not in copied


def test_the_kv_cache_is_one_to_the_engine(pretended: PretendedDriver) -> None:
    with load(4) as engine, engine.backend.memory() as memory:
        op = next(op for op in engine.backend.step(1, NO_LOGITS) if isinstance(op, Attention))
        rows = np.arange(5 * 256, dtype=np.float16).reshape(5, 256)
        memory.write(op.values.rows(3, 8), rows)
        np.testing.assert_array_equal(memory.read(op.values.rows(4, 6)), rows[1:3])
        own = engine.backend._ranks[2]
        _, values = layer_cache(own.buffers["kv_cache"], 0)
        with own.owner.current():
            np.testing.assert_array_equal(own.memory.read(values.rows(3, 8)), rows[:, 128:192])
        with pytest.raises(NotImplementedError, match="residual"):
            memory.read(replace(op.q, name="residual"))
        with pytest.raises(NotImplementedError, match=r"cannot read or write sampling\.seen"):
            memory.read(replace(op.q, name="sampling.seen"))


def test_bytes_per_token_are_the_models(pretended: PretendedDriver) -> None:
    with load(2) as several, Engine.random(SMALL, "cuda", 32) as one:
        assert several.weight_bytes_per_token == pytest.approx(one.weight_bytes_per_token, rel=0.1)


@pytest.mark.parametrize(
    ("gpus", "reason"),
    [
        (8, "There is no GPU number 4 for --gpus: the NVIDIA driver sees 4 GPUs"),
        ([0, 0, 1], "A GPU is named more often"),
        (3, "3 GPUs cannot share this model evenly, because it has 4 key/value heads; use --gpus 1 or --gpus 2 or"),
    ],
)
def test_gpus_that_are_not_there(pretended: PretendedDriver, gpus: Any, reason: str) -> None:
    geometry = replace(SMALL, heads=8, kv_heads=8, hidden=256, ffn=512, vocabulary=1024) if gpus == 8 else SMALL
    if gpus == [0, 0, 1]:
        geometry = replace(SMALL, heads=6, kv_heads=3, hidden=48 * 6, ffn=24 * 12)
    with pytest.raises(AtomFlowError) as error:
        load(gpus, geometry)
    assert reason in str(error.value)
    assert not pretended.live


def test_a_list_of_one_gpu_means_that_one(pretended: PretendedDriver) -> None:
    with load([3]) as engine:
        assert engine.backend._gpu.ordinal == 3


def test_gpus_that_are_not_connected_or_not_alike(pretended: PretendedDriver) -> None:
    pretended.peer_access = 0
    with pytest.raises(BackendError, match="GPU 0 cannot access the memory of GPU 1; choose GPUs that NVLink connects"):
        load(2)
    pretended.peer_access = 1
    pretended.other_names[1] = b"Older GPU\0"
    with pytest.raises(BackendError, match="GPU 0 is a Pretended GPU and GPU 1 a Older GPU, or of another size"):
        load(2)
    assert not pretended.live


@pytest.mark.parametrize("function", ["cuMemAlloc", "cuModuleLoadData", "cuCtxEnablePeerAccess", "cuStreamCreate"])
def test_after_a_failure_all_gpus_are_given_back(pretended: PretendedDriver, function: str) -> None:
    calls = 0

    def third(_number: int, name: str) -> Status | None:
        nonlocal calls
        calls += name == function
        return Status.CUDA_ERROR_UNKNOWN if name == function and calls == 2 else None

    pretended.before = third
    with pytest.raises(BackendError):
        load(2)
    pretended.behave()
    assert not pretended.live


def test_closing_waits_for_every_gpu(monkeypatch: pytest.MonkeyPatch, pretended: PretendedDriver) -> None:
    """After one has failed, too: the steps of the others may write to its memory."""
    wait, waited = rank.Rank.wait, list[int]()

    def fails(self: rank.Rank) -> None:
        wait(self)
        waited.append(self.number)
        raise BackendError("the GPU failed")

    with load(2) as engine:
        engine.backend.prefill([7], NO_LOGITS)
        monkeypatch.setattr(rank.Rank, "wait", fails)
    assert waited == [0, 1]
    assert not pretended.live


class Watching:
    """An observer that notes the ops, and how often kernels had been launched when each began."""

    def __init__(self, launched: list[tuple[str, Any]]) -> None:
        self._launched, self.ops = launched, dict[str, list[str]]()

    def before(self, op: Op, memory: Memory) -> None:
        self._launched.clear()

    def after(self, op: Op, memory: Memory) -> None:
        self.ops[op.kind] = [name for name, _ in self._launched]


def test_an_observed_step_runs_op_by_op_on_every_rank(
    pretended: PretendedDriver, launched: list[tuple[str, Any]]
) -> None:
    with load(2) as engine:
        for head in (SAMPLE, NO_LOGITS):
            observer = Watching(launched)
            engine.backend.observe([7], head, observer)
            step, publish = ["persistent_rank"] * 2, ["publish"] * 2
            projections = dict.fromkeys(("qkv", "attention", "o", "gate_up", "down"), publish + step)
            if head == SAMPLE:
                chosen = {"sample": step + ["argmax", "sample"] * 2, "advance": ["advance_sampled"] * 2}
                assert observer.ops == {"embed": step, **projections, "lm_head": publish + step, **chosen}
            else:
                assert observer.ops == {"embed": step, **projections, "advance": step}
        assert engine.backend._queue.position == 2
        observer = Watching(launched)
        assert engine.backend.logits(0, 1, observer).shape == (1, 300)
        assert observer.ops == {"lm_head": publish + step}


def test_activations_are_captured_and_edited(pretended: PretendedDriver) -> None:
    seen: list[tuple[tuple[int, ...], int]] = []
    with load(2) as engine:
        assert engine.capture([1, 2, 3], "layer.0.q")["layer.0.q"].shape == (3, 512)
        assert engine.unembed(np.ones((2, 256), np.float32)).shape == (2, 300)
        with engine.edit({"layer.0.attention": lambda rows, position: seen.append((rows.shape, position))}):
            engine.feed([4, 5])
        assert seen == [((1, 512), 3), ((1, 512), 4)]
        numba_cuda = pytest.importorskip("numba.cuda")
        function = numba_cuda.jit(device=True)(lambda row, position, index: row[index])
        with pytest.raises(OptionError, match="load the model on one GPU"), engine.edit({"layer.0.q": function}):
            pass


@pytest.mark.parametrize("name", ["residual", "q", "attn_out", "y", "x_norm", "logits"])
def test_a_view_of_the_whole_model_is_that_of_all_ranks(pretended: PretendedDriver, name: str) -> None:
    geometry = replace(SMALL, heads=4, ffn=352)  # a rank's part of the MLP is no multiple of 128: there is padding
    with load(2, geometry) as engine, engine.backend.memory() as memory:
        view = next(view for op in engine.backend.step(1, SAMPLE) if (view := getattr(op, name, None)))
        values = np.arange(view.shape[-1], dtype=view.dtype)[None]
        memory.write(view, values)
        np.testing.assert_array_equal(memory.read(view), values)
        own = engine.backend._ranks[1]
        buffer = own.buffers[view.name]
        with own.owner.current():
            part = own.memory.read(buffer)
        if name in ("q", "attn_out", "y"):
            values = values[:, view.shape[-1] // 2 :]
        np.testing.assert_array_equal(part[:, : values.shape[1]], values)
        assert not part[:, values.shape[1] :].any(), "padding is still zero"


def test_a_traced_step_shows_the_ctas_of_all_ranks(
    monkeypatch: pytest.MonkeyPatch, pretended: PretendedDriver, launched: list[tuple[str, Any]]
) -> None:
    with load(2) as engine:
        shape = engine.backend._ranks[0].kernels.persistent_shape
        times = np.arange(shape.ops * EVENTS, dtype=np.float64).reshape(1, shape.ops, EVENTS).repeat(shape.sms, 0)
        monkeypatch.setattr(rank.Rank, "read_times", lambda self: times + 1e6 * self.number)
        launched.clear()
        trace = engine.backend.measure.trace_step(1)
        assert [name for name, _ in launched] == ["persistent_rank_traced"] * 4, "one step to warm up, on both ranks"
        assert trace.begun.shape == (2 * shape.sms, shape.ops)
        np.testing.assert_array_equal(trace.begun[: shape.sms], trace.begun[shape.sms :])
        assert [op.name for op, _ in engine.backend.measure.time_ops(1)] == list(trace.names)
        assert engine.backend.measure.time_step(2) > 0


@pytest.mark.parametrize("depth", [0, 20, 31])
def test_a_profile_at_any_depth(monkeypatch: pytest.MonkeyPatch, pretended: PretendedDriver, depth: int) -> None:
    """At the last position, too, where fewer steps fit than are otherwise timed together."""
    with load(2) as engine:
        shape = engine.backend._ranks[0].kernels.persistent_shape
        times = np.arange(shape.ops * EVENTS, dtype=np.float64).reshape(1, shape.ops, EVENTS).repeat(shape.sms, 0)
        monkeypatch.setattr(rank.Rank, "read_times", lambda _self: times)
        report = profile(engine, depth, repeats=1)
        assert report.to_dict()["depth"] == depth
        assert engine.backend._queue.position == depth


@pytest.mark.parametrize("latencies", [(700.0, 700.0), (700.0, 900.0)])
def test_clocks_are_set_by_causality(latencies: tuple[float, float]) -> None:
    """Two ranks that wait for each other before each op; the second one's clock began 5 ms before."""
    rng = np.random.default_rng(3)
    times, there, back = np.full((2, 6, 12, EVENTS), np.nan), *latencies
    staged = done = np.zeros(2)
    for op in range(1, 12):
        apart = (op - 1) % OPS_PER_LAYER == ATTENTION and op != 11
        staged = done.copy() if apart else np.array([max(done[0] + 300, done[1] + back), max(done[0] + there, done[1])])
        times[:, :, op, STAGED] = staged[:, None] + rng.uniform(0, 50, (2, 6)) + (rng.uniform(0, 200) if op > 2 else 0)
        times[:, :, op, DONE] = times[:, :, op, STAGED] + rng.uniform(1000, 3000, (2, 6))
        done = times[:, :, op, DONE].max(axis=1)
    shifted = times.copy()
    shifted[1] += 5e6
    clock = compare_clocks(shifted[0], shifted[1])
    assert clock.ahead == pytest.approx(5e6, abs=250)
    assert 650 < clock.latency < 1100
    together = merged([shifted[0], shifted[1]])
    np.testing.assert_allclose(together[6:], times[1], atol=250)
    np.testing.assert_array_equal(together[:6], times[0])
