"""Prompts on the GEMM path: what is chosen, planned, loaded, captured and launched; over a pretended driver."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
from pretended_gpu import PretendedDriver, Status, pretend_compiler
from tiny_models import tiny_geometry

pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
pytest.importorskip("numba_cuda", reason="the CUDA backend needs it; there is none for macOS")

from numba_atomflow import Engine
from numba_atomflow.backends.base import PrefillPath
from numba_atomflow.backends.cuda.backend import CudaBackend
from numba_atomflow.backends.cuda.kernels import ModelKernels
from numba_atomflow.backends.cuda.plan import cuda_plan
from numba_atomflow.backends.cuda.prefill_path import choose_prefill_path
from numba_atomflow.errors import BackendError
from numba_atomflow.model.step import NO_LOGITS, SAMPLE, Attention, GateUp, LmHead, Qkv
from numba_atomflow.ops.cuda.gemm.plan import MOST_PADDING
from numba_atomflow.ops.cuda.prefill.buckets import DEFAULT_CHUNK, bucket_for, buckets_up_to
from numba_atomflow.ops.cuda.runtime.chip import Chip

LAYERS, MAX_SEQ_LEN, CHUNK = 2, 300, 250
LLAMA, QWEN = tiny_geometry(layers=LAYERS), tiny_geometry(layers=LAYERS, qk_norm=True)
HOPPER, AMPERE, TURING = (Chip(132, 232448, capability) for capability in ((9, 0), (8, 0), (7, 5)))


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_compiler(monkeypatch)


@pytest.fixture(params=[(LLAMA, "gemm"), (QWEN, "gemm"), (LLAMA, "fp8")], ids=["llama", "qwen", "fp8"])
def engine(pretended: PretendedDriver, request: pytest.FixtureRequest) -> Iterator[Engine]:
    geometry, path = request.param
    assert pretended.gpus == 1
    with Engine.random(geometry, "cuda", MAX_SEQ_LEN, prefill=path, prefill_chunk=CHUNK) as engine:
        assert engine.backend.prefill_path == PrefillPath(path)
        yield engine


@pytest.fixture
def backend(engine: Engine) -> CudaBackend:
    assert isinstance(engine.backend, CudaBackend)
    return engine.backend


def since(pretended: PretendedDriver, first: int) -> Counter[str]:
    """Calls of the driver that put work into a stream, or capture it, or load a kernel."""
    calls = Counter(pretended.calls[first:])
    names = ("cuGraphLaunch", "cuLaunchKernelEx", "cuGraphInstantiate", "cuModuleLoadData")
    return Counter({name: calls[name] for name in names if calls[name]})


def test_after_a_warm_up_no_prompt_loads_or_captures_anything(pretended: PretendedDriver, engine: Engine) -> None:
    engine.warm_up()
    assert engine.position == 0
    first = len(pretended.calls)
    for length in (1, 2, 8, 9, 16, 17, 33, 65, 129, CHUNK, CHUNK + 1, MAX_SEQ_LEN):
        engine.reset()
        engine.feed([0] * length)
    assert set(since(pretended, first)) == {"cuGraphLaunch", "cuLaunchKernelEx"}


# --- the choice ------------------------------------------------------------------------------------------------------


def test_auto_is_gemm_where_it_can_run() -> None:
    assert choose_prefill_path("auto", HOPPER, 4096) == PrefillPath("gemm")
    path = choose_prefill_path("auto", TURING, 4096)
    assert path.name == "gemv"
    assert "compute capability is 7.5" in path.reason
    assert choose_prefill_path("gemv", TURING, 4096) == PrefillPath("gemv")
    assert choose_prefill_path("gemm", AMPERE, 4096) == PrefillPath("gemm")
    assert (
        str(choose_prefill_path("fp8", HOPPER, 8)) == "gemv, because a context of 8 tokens fits into one of its steps"
    )


def test_what_cannot_run_is_refused_with_the_reason() -> None:
    reason = "this GPU's compute capability is 7.5, and its kernels need 8.0"
    with pytest.raises(BackendError, match=f"^--prefill gemm is not possible because {reason}; use --prefill gemv"):
        choose_prefill_path("gemm", TURING, 4096)
    with pytest.raises(BackendError, match=r"^--prefill fp8 is not possible because FP8 activations have kernels for"):
        choose_prefill_path("fp8", AMPERE, 4096)


def test_buckets_are_few_and_waste_little() -> None:
    buckets = buckets_up_to(DEFAULT_CHUNK)
    assert len(buckets) == 15
    assert (buckets[0], buckets[-1]) == (16, DEFAULT_CHUNK)
    for tokens in range(1, DEFAULT_CHUNK + 1):
        bucket = bucket_for(tokens)
        assert bucket in buckets
        assert tokens <= bucket < tokens + max(16, tokens)
        assert bucket_for(bucket) == bucket


def test_inputs_that_no_kernel_writes_in_fp8_are_quantized_by_one_of_their_own() -> None:
    def quantizing(head_dim: int, *, fp8: bool) -> list[str]:
        geometry = tiny_geometry(head_dim=head_dim)
        prefill = ModelKernels(geometry, HOPPER, chunk=64, fp8_activations=fp8).prefill
        assert prefill is not None
        assert prefill.tiles[prefill.input_of("o")].bits == prefill.tiles[prefill.input_of("down")].bits
        assert prefill.tiles["intermediate"].bits == prefill.tiles["final_x_norm"].bits == 16
        return [kind for kind in prefill.layer_kinds if "quantize" in kind]

    assert quantizing(64, fp8=True) == ["quantize_o", "quantize_down"]
    assert quantizing(128, fp8=True) == ["quantize_down"]
    assert quantizing(128, fp8=False) == []


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chip", [HOPPER, AMPERE])
@pytest.mark.parametrize("chunk", [1, 9, 100, 2048, 5000])
def test_activations_hold_a_padded_chunk(chunk: int, chip: Chip) -> None:
    kernels = ModelKernels(LLAMA, chip, chunk=chunk)
    shapes = {buffer.name: buffer.shape for buffer in cuda_plan(kernels, 8192).buffers}
    capacity = bucket_for(chunk) + MOST_PADDING
    width = kernels.gemv_width
    for name in ("tokens", "residual", "q"):
        assert shapes[name][0] >= capacity + width
    for name in ("x_norm", "attn_out", "intermediate"):
        assert shapes[name][0] == width
    assert shapes["tiles.intermediate"] == (capacity * 384 // 2,)
    assert shapes["kv_cache"][2] == 8192 + width - 1  # padding of chunks is not written
    assert shapes["logits"][0] >= min(bucket_for(chunk), 128)


def test_without_the_gemm_path_nothing_is_added() -> None:
    names = {buffer.name for buffer in cuda_plan(ModelKernels(LLAMA, HOPPER), 64).buffers}
    assert not {name for name in names if name.startswith(("tiles.", "prefill.")) or name == "count"}


def test_nothing_is_allocated_after_loading(pretended: PretendedDriver, backend: CudaBackend) -> None:
    first = len(pretended.calls)
    for tokens in (CHUNK, 70, 9, 3):
        backend.prefill([1] * tokens, SAMPLE)
        backend.logits(0, tokens)
        backend.seek(0)
    assert not {"cuMemAlloc", "cuMemHostAlloc"} & set(pretended.calls[first:])


# --- steps -----------------------------------------------------------------------------------------------------------


def test_a_chunk_is_one_graph_and_its_end_and_a_graph_serves_its_bucket(
    pretended: PretendedDriver, backend: CudaBackend
) -> None:
    assert backend.prefill_chunk == CHUNK
    loaded = backend._graphs._loaded
    assert not [name for name in loaded._loaded if name.endswith(("_chunk", "_tiles"))]
    first = len(pretended.calls)
    backend.prefill([1] * 70, NO_LOGITS)
    calls = since(pretended, first)
    kinds = len(backend.kernels.prefill.layer_kinds)  # type: ignore[union-attr]
    assert calls["cuModuleLoadData"] == kinds
    assert (calls["cuGraphInstantiate"], calls["cuGraphLaunch"]) == (1, 1)
    assert (
        calls["cuLaunchKernelEx"] == 1 + LAYERS * kinds + 1
    )  # captured: embed, and layers, each with two norms; advance
    for tokens, head, tail in ((128, NO_LOGITS, 1), (65, SAMPLE, 4), (70, SAMPLE, 4)):
        backend.seek(0)
        first = len(pretended.calls)
        backend.prefill([1] * tokens, head)
        assert since(pretended, first) == Counter(cuGraphLaunch=1, cuLaunchKernelEx=tail)
        with backend._owner.current():
            assert backend._model.memory.read(backend._model.buffers["count"]) == tokens


def test_a_failure_at_any_call_of_a_first_chunk_leaves_nothing_behind(pretended: PretendedDriver) -> None:
    """Compiling, loading and capturing happen in the middle of a prompt; the first call of every name fails once."""

    def load() -> Engine:
        return Engine.random(tiny_geometry(layers=1), "cuda", 64, prefill="gemm")

    with load() as engine:
        first = len(pretended.calls)
        engine.backend.prefill([1] * 20, SAMPLE)
        names = dict.fromkeys(pretended.calls[first:])
    assert {"cuModuleLoadData", "cuGraphInstantiate", "cuGraphLaunch", "cuMemcpyHtoDAsync"} <= set(names)
    for name in names:
        with load() as engine:
            pretended.failing = {name: Status.CUDA_ERROR_OUT_OF_MEMORY}
            with suppress(BackendError):
                engine.backend.prefill([1] * 20, SAMPLE)
            pretended.behave()
            if name == "cuCtxPopCurrent":
                pretended.stack().clear()
        left = 1 if name == "cuGraphDestroy" else 0  # which was not destroyed
        assert pretended.counts().total() <= left, name
        pretended.live.clear()


def test_few_tokens_take_the_gemv_kernels(pretended: PretendedDriver, backend: CudaBackend) -> None:
    width = backend.kernels.gemv_width
    backend.prefill([1] * width, SAMPLE)
    names = set(backend._graphs._loaded._loaded)
    assert f"qkv_x{width}" in names
    assert "embed_chunk" not in names
    assert all(op.x_norm.tiling is None for op in backend.step(width, SAMPLE) if isinstance(op, Qkv | GateUp))
    assert pretended.misuses == []


def test_inputs_of_projections_are_tiled_and_seen_as_rows(backend: CudaBackend) -> None:
    ops = backend.step(70, SAMPLE)
    for op in ops:
        match op:
            case Qkv():
                assert op.x_norm.shape == (70, LLAMA.hidden)
                assert op.x_norm.tiling is not None
                assert (op.qkv is None) == (backend.geometry == LLAMA)
            case Attention():
                assert op.attn_out.shape == (70, LLAMA.q_dim)
                assert op.attn_out.tiling is not None
            case LmHead():
                assert op.x_norm.tiling is None  # one row, by the GEMV kernel
                assert op.x_norm.shape == (1, LLAMA.hidden)
    values = (np.arange(70 * LLAMA.hidden) % 8).reshape(70, -1).astype(np.float16)  # exact in FP8, too, scaled by 64
    view = next(op.x_norm for op in ops if isinstance(op, Qkv))
    with backend._owner.current():
        backend._model.memory.write(view, values)
        np.testing.assert_array_equal(backend._model.memory.read(view), values)


@pytest.mark.parametrize(
    ("start", "stop", "pieces"),
    [
        (0, 192, [(0, 128), (128, 192)]),
        (0, 250, [(0, 128), (128, 250)]),
        (0, 130, [(0, 128), (128, 130)]),
        (0, 5, [(0, 5)]),
        (69, 70, [(69, 70)]),
    ],
)
def test_logits_of_many_rows_are_computed_in_pieces(
    backend: CudaBackend, start: int, stop: int, pieces: list[tuple[int, int]]
) -> None:
    assert backend._head_rows(start, stop) == pieces
    for first, last in pieces:
        op = backend._model.head(first, last)
        assert (op.x_norm.tiling is not None) == (last - first > backend.kernels.gemv_width)


def test_a_long_prompt_runs_in_chunks(pretended: PretendedDriver, engine: Engine) -> None:
    first = len(pretended.calls)
    engine.backend.seek(0)
    context = engine._open_context()
    context.prefill([1] * (CHUNK + 20), NO_LOGITS)
    assert since(pretended, first)["cuGraphLaunch"] == 2
    assert len(context.token_ids) == CHUNK + 20


def test_launches_are_those_of_the_bucket(backend: CudaBackend) -> None:
    """The same launches for every number of tokens of a bucket; those of RMSNorm have a CTA for each token of it."""
    prefill = backend.kernels.prefill
    assert prefill is not None
    for kind in prefill.layer_kinds + prefill.head_kinds:
        assert prefill.kernel(kind, 65) == prefill.kernel(kind, 128)
    assert prefill.kernel("norm", 65).ctas == 128
    assert prefill.kernel("norm", 65).spec == prefill.kernel("norm", 20).spec
    specs = {}
    for bucket in prefill.buckets:
        for kind in prefill.layer_kinds + (prefill.head_kinds if bucket <= prefill.head_rows else []):
            spec = prefill.kernel(kind, bucket).spec
            assert specs.setdefault(spec.name, spec) == spec, "two kernels of one name"


def test_the_kernels_of_a_chunk_are_timed_and_nothing_is_left_of_it(
    pretended: PretendedDriver, backend: CudaBackend
) -> None:
    backend.prefill([1] * 20, SAMPLE)
    before = pretended.counts()
    times, whole = backend.measure.time_chunk(70, repeats=2)
    assert whole == pytest.approx(1e-3)  # of every graph, says the driver
    prefill = backend.kernels.prefill
    assert prefill is not None
    names = {prefill.kernel(kind, 70).spec.name for kind in prefill.layer_kinds}
    assert {time.name for time in times} == names
    launches = {time.name: time.launches for time in times}
    assert (launches["embed_chunk"], launches["norm_tiles"], launches["attention_chunk"]) == (1, 2 * LAYERS, LAYERS)
    after = pretended.counts()
    assert after["executable graph"] == before["executable graph"]
    assert backend._queue.position == 20
    with pytest.raises(IndexError):
        backend.measure.time_chunk(MAX_SEQ_LEN - 19, repeats=1)


def test_beside_any_kernel_of_a_chunk_two_ctas_of_a_gemm_find_room(backend: CudaBackend) -> None:
    """With programmatic dependent launch they start beside it, and wait for each other."""
    prefill = backend.kernels.prefill
    assert prefill is not None
    few = [prefill.kernel(kind, 16) for kind in prefill.layer_kinds]
    assert backend.prefill_path.name == "fp8" or any(kernel.ctas == 2 * 132 for kernel in few)
    assert all(kernel.spec.whole_carveout for kernel in few)


def test_a_start_without_the_gemm_path_does_not_import_it() -> None:
    program = "import sys; import numba_atomflow.backends.cuda.backend; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported = done.stdout.split()
    assert "numba_atomflow.backends.cuda.kernels" in imported
    assert not [name for name in imported if name.startswith("numba_atomflow.ops.cuda.gemm.")]
