"""How decode steps run: what is chosen for which chip and model, what is refused, and where the choice is told."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from pretended_gpu import PretendedDriver
from tiny_models import tiny_geometry

pytest.importorskip("numba_cuda", reason="the CUDA backend is made of it; there is none for macOS")

from numba_atomflow import Engine
from numba_atomflow.backends.base import Decode, DecodePath, PrefillPath
from numba_atomflow.backends.cpu import CpuBackend
from numba_atomflow.backends.cuda.backend import CudaBackend
from numba_atomflow.backends.cuda.decode_path import choose_decode_path
from numba_atomflow.backends.cuda.kernels import ModelKernels
from numba_atomflow.backends.cuda.plan import plan_for_this_gpu
from numba_atomflow.cli.report import headline
from numba_atomflow.errors import BackendError, OptionError
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.perf.bench import BenchReport, Settings, bench, differences
from numba_atomflow.perf.profile import profile

HOPPER, ADA = Chip(132, 232448, (9, 0)), Chip(128, 101376, (8, 9))
BLACKWELL = Chip(170, 101376, (12, 0))
LLAMA, QWEN2, QWEN3 = tiny_geometry(), tiny_geometry(qkv_bias=True), tiny_geometry(qk_norm=True)
OLMO2 = tiny_geometry(qk_norm=True, qk_norm_of_all_heads=True, pre_norm=False, post_norm=True)
GRAPH = DecodePath("graph", "the moon is full")

NORMS = "the model has norms after attention and after the MLP"
CAPABILITY = "this GPU's compute capability is 8.9, and bulk copies need 9.0"


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chip", "geometry"), [(HOPPER, LLAMA), (BLACKWELL, LLAMA), (HOPPER, QWEN2), (HOPPER, QWEN3)])
def test_auto_and_persistent_are_persistent_where_everything_is_there(chip: Chip, geometry: Any) -> None:
    kernels = ModelKernels(geometry, chip)
    for wanted in ("auto", "persistent"):
        path = choose_decode_path(kernels, wanted)
        assert (path.name, path.reason, str(path)) == ("persistent", "", "persistent")


@pytest.mark.parametrize(("chip", "geometry"), [(HOPPER, LLAMA), (HOPPER, QWEN3), (ADA, LLAMA)])
def test_a_graph_that_is_asked_for_is_made(chip: Chip, geometry: Any) -> None:
    assert str(choose_decode_path(ModelKernels(geometry, chip), "graph")) == "graph, because it was requested"


@pytest.mark.parametrize(
    ("chip", "geometry", "reason"),
    [(ADA, LLAMA, CAPABILITY), (ADA, QWEN3, CAPABILITY), (HOPPER, OLMO2, NORMS)],
)
def test_chip_and_model_may_stand_in_the_way(chip: Chip, geometry: Any, reason: str) -> None:
    assert_impossible(ModelKernels(geometry, chip), reason)


def test_a_kernel_that_cannot_be_cut_stands_in_the_way() -> None:
    many = tiny_geometry(heads=18, kv_heads=2)
    assert_impossible(ModelKernels(many, HOPPER), "9 heads share a key/value head, and 8 is the most")
    narrow = replace(HOPPER, shared_bytes=48 << 10)
    assert_impossible(ModelKernels(LLAMA, narrow), "48 KB of shared memory leave no room for a pipeline of weights")


def assert_impossible(kernels: ModelKernels, reason: str) -> None:
    """ "auto" gives way and tells why; "persistent" is refused with the same reason, and with what to do."""
    assert reason
    assert choose_decode_path(kernels, "auto") == DecodePath("graph", reason)
    with pytest.raises(BackendError) as caught:
        choose_decode_path(kernels, "persistent")
    assert str(caught.value) == f"--decode persistent is not possible because {reason}; use --decode graph."


# --- the backend and the engine --------------------------------------------------------------------------------------


@pytest.fixture
def ada(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedDriver]:
    gpu = PretendedDriver((8, 9)).install(monkeypatch)
    monkeypatch.setattr(CudaBackend, "_allocate", lambda _self: None)
    yield gpu
    gpu.assert_used_well()
    assert gpu.counts() == {}


@pytest.mark.parametrize(("wanted", "reason"), [("auto", CAPABILITY), ("graph", "it was requested")])
def test_the_backend_says_how_it_decodes(ada: PretendedDriver, wanted: Decode, reason: str) -> None:
    backend = CudaBackend(LLAMA, {}, 32, decode=wanted)
    assert ada.counts() == {"context": 1}
    assert backend.decode_path == DecodePath("graph", reason)
    backend.close()


@pytest.mark.usefixtures("ada")
@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_what_the_gpu_cannot_do_is_refused_and_the_gpu_given_back(backend: Any) -> None:
    with pytest.raises(BackendError, match=f"^--decode persistent is not possible because {CAPABILITY}"):
        Engine.random(LLAMA, backend, decode="persistent")


@pytest.mark.usefixtures("ada")
def test_the_plan_for_a_gpu_comes_with_how_it_would_decode() -> None:
    plan, device = plan_for_this_gpu(LLAMA, "fp16", 32)
    assert device["decode"] == {"name": "graph", "reason": CAPABILITY}
    assert device["prefill"]["name"] == "gemm"
    backend = CudaBackend(LLAMA, {}, 32)
    assert plan == backend.plan
    backend.close()


@pytest.mark.parametrize("load", [partial(Engine.load, "no-such-model"), partial(Engine.random, LLAMA)])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cpu", "decode": "graph"}, "--decode graph is for the CUDA backend; leave it out"),
        ({"backend": "cpu", "decode": "persistent"}, "--decode persistent is for the CUDA backend; leave it out"),
        ({"threads": 1, "decode": "graph"}, "--threads is for the CPU backend and --decode graph for the CUDA one"),
        ({"decode": "quick"}, "--decode quick does not exist; choose auto, graph or persistent"),
        ({"backend": "cpu", "prefill": "gemm"}, "--prefill gemm is for the CUDA backend; leave it out"),
        ({"threads": 1, "prefill": "gemv"}, "--threads is for the CPU backend and --prefill gemv for the CUDA one"),
        ({"prefill": "quick"}, "--prefill quick does not exist; choose auto, gemv, gemm or fp8"),
        ({"backend": "cpu", "prefill_chunk": 64}, "--prefill-chunk 64 is for the CUDA backend; leave it out"),
        ({"prefill": "gemv", "prefill_chunk": 64}, "--prefill-chunk 64 is not for --prefill gemv; leave one"),
        ({"prefill_chunk": 17000}, "--prefill-chunk is 17000; it must be from 16 to 16384"),
        ({"prefill": "gemm", "prefill_chunk": 8}, "--prefill-chunk is 8; it must be from 16 to 16384"),
    ],
)
def test_contradictions_are_refused_before_a_model_is_looked_for(
    load: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        load(**options)


def test_auto_is_for_every_backend() -> None:
    with Engine.random(LLAMA, "cpu", 16, 1, decode="auto") as engine:
        assert engine.backend.decode_path is None


# --- reports ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.random(LLAMA, max_seq_len=16, threads=1) as engine:
        engine.backend.measure.ceilings = lambda: {"memory read": 10.0}
        yield engine


def measured(engine: Engine) -> BenchReport:
    return bench(engine, Settings(prompt_tokens=2, decode_tokens=2, repeats=1))


def test_reports_tell_the_path_where_there_is_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    without = measured(engine)
    monkeypatch.setattr(CpuBackend, "decode_path", GRAPH)
    for report in (measured(engine), profile(engine, 0, 1)):
        assert report.to_dict()["decode"] == {"name": "graph", "reason": "the moon is full"}
        assert headline(report)[2] == "decode: graph, because the moon is full"
    assert not any(line.startswith("decode") for line in headline(without))


def test_a_report_is_read_back_with_its_path_and_from_before_there_was_one(engine: Engine) -> None:
    report = measured(engine)
    for path in (None, GRAPH, DecodePath("persistent")):
        record = {**report.to_dict(), "decode": path and {"name": path.name, "reason": path.reason}}
        assert BenchReport.from_dict(record).decode == path
    old = {name: value for name, value in report.to_dict().items() if name != "decode"}
    assert BenchReport.from_dict(old) == report


def test_another_path_is_a_difference(engine: Engine) -> None:
    report = measured(engine)
    then, now = replace(report, decode=GRAPH), replace(report, decode=DecodePath("persistent"))
    assert differences(now, then) == {"decode": ("graph", "persistent")}
    then, now = replace(report, prefill=PrefillPath("gemv")), replace(report, prefill=PrefillPath("gemm"))
    assert differences(now, then) == {"prefill": ("gemv", "gemm")}
    assert BenchReport.from_dict(now.to_dict()) == now
