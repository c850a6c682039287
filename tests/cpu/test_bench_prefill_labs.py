"""What the workers of bench_prefill.py measure: engines, and kernels beside PyTorch's."""

import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prefill_bench import engines
from prefill_bench.cases import REPLY, Case
from pretended_gpu import PretendedDriver
from tiny_models import tiny_geometry

from numba_atomflow import Engine
from numba_atomflow.device.resources import DeviceResources, Resources
from numba_atomflow.errors import OptionError
from numba_atomflow.model.presets import PRESETS
from numba_atomflow.ops import jit
from numba_atomflow.ops.attention import attend_reference
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.runtime import bandwidth, build
from numba_atomflow.ops.fp8 import dequantize_groups

TINY = "llama-3.2-3b"  # the name that the tiny geometry takes here


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "ffn": 384, "max_positions": 1024}
    monkeypatch.setitem(PRESETS, TINY, tiny_geometry(**sizes))


# --- engines ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def lab(tiny: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[engines.EngineLab, list[Any]]]:
    """Engines on the CPU, and the options that they were loaded with."""
    loads: list[Any] = []
    original = Engine.random

    def on_the_cpu(geometry: Any, backend: str, max_seq_len: int, *, prefill: str, name: str) -> Engine:
        loads.append((backend, prefill))
        return original(geometry, "cpu", 512, threads=1, name=name)

    monkeypatch.setattr(engines.Engine, "random", on_the_cpu)
    monkeypatch.setattr(engines, "_SECONDS", 0.0)
    made = engines.EngineLab()
    yield made, loads
    made.close()


def test_an_engine_is_measured_and_kept_for_the_next_case(lab: tuple[engines.EngineLab, list[Any]]) -> None:
    made, loads = lab
    ttft = made.measure(Case("ttft", TINY, "gemm", 16))
    assert [len(seconds) for seconds in ttft.seconds.values()] == [3, 3]  # after a pause, and back to back
    request = made.measure(Case("requests", TINY, "gemm", 64))
    assert set(request.seconds) == {"ttft", "tpot", "total"}
    for first, each, total in zip(*(request.seconds[name] for name in ("ttft", "tpot", "total")), strict=True):
        assert total == pytest.approx(first + REPLY * each)
        assert min(first, each) > 0
    decode = made.measure(Case("decode", TINY, "gemm", 16))
    assert len(decode.seconds["tpot"]) == REPLY
    assert loads == [("cuda", "gemm")]
    made.measure(Case("ttft", TINY, "fp8", 16))
    assert loads[1:] == [("cuda", "fp8")]


# --- tensors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [ActivationTiles(192, 16), ActivationTiles(256, 24, weight_bits=16)], ids=str)
def test_tiles_on_the_gpu_are_those_of_the_reference(tiles: ActivationTiles) -> None:
    torch = pytest.importorskip("torch")
    from prefill_bench.torch_gpu import pack_tiles, unpack_tiles

    x = np.random.default_rng(0).standard_normal((tiles.tokens - 3, tiles.in_features)).astype(np.float16)
    words = pack_tiles(tiles, torch.from_numpy(x))
    np.testing.assert_array_equal(words.numpy().view(np.uint32), tiles.pack(x))
    np.testing.assert_array_equal(unpack_tiles(tiles, words, [5, 0]).numpy(), x[[5, 0]])


def test_fp8_tiles_are_those_of_the_reference() -> None:
    torch = pytest.importorskip("torch")
    from prefill_bench.torch_gpu import pack_fp8_tiles, quantize

    tiles = ActivationTiles(256, 16, 8)
    x = np.random.default_rng(0).standard_normal((11, 256)).astype(np.float32)
    words = pack_fp8_tiles(tiles, *quantize(torch.from_numpy(x)))
    got, expected = (tiles.unpack(each)[:11] for each in (words.numpy().view(np.uint32), tiles.pack(x)))
    np.testing.assert_allclose(got, expected, rtol=1e-6)  # a scale may be rounded another way


def test_weights_are_quantized_as_in_the_checkpoint() -> None:
    torch = pytest.importorskip("torch")
    from prefill_bench.torch_gpu import dequantize, quantize, relative_error

    weights = torch.randn(8, 256)
    codes, scales = quantize(weights)
    back = dequantize_groups(codes.numpy(), scales.numpy())
    np.testing.assert_array_equal(dequantize(codes, scales, torch.float32).numpy(), back)
    assert relative_error(torch.from_numpy(back), weights.double()) < 0.04


def test_the_reference_of_attention() -> None:
    torch = pytest.importorskip("torch")
    from prefill_bench.attention import attend

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((20, width)).astype(np.float16) for width in (128, 32, 32))
    got = attend(*map(torch.from_numpy, (q, k, v)), 16, [0, 7, 19])
    expected = attend_reference(*(x.astype(np.float64) for x in (q, k, v)), 0, 16)
    np.testing.assert_allclose(got.numpy(), expected[[0, 7, 19]], rtol=1e-12, atol=1e-12)


def test_a_launch_keeps_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from prefill_bench import torch_gpu
    from prefill_bench.compiled import H200

    PretendedDriver().install(monkeypatch)
    monkeypatch.setattr(torch_gpu, "build", lambda specs, _capability: dict.fromkeys(specs, b"code"))
    gpu = torch_gpu.TorchGpu.__new__(torch_gpu.TorchGpu)
    gpu.chip, gpu.stream, gpu._kernels, gpu._resources = H200, SimpleNamespace(cuda_stream=7), {}, Resources()
    source, total = torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with DeviceResources() as owner:
        owner.open()
        with owner.current():  # as PyTorch's context is
            launch = gpu.launch(bandwidth.read_kernel(H200.sms), {"source": source, "total": total, "unused": source})
            gpu._resources.close()
    kept = weakref.ref(source)
    address = source.data_ptr()
    del source
    assert kept() is not None
    assert address in list(launch.launch._words)
    with pytest.raises(ValueError, match="contiguous"):
        torch_gpu.span(torch.zeros(4, 4).T)


def test_sides_take_turns_and_seconds_are_those_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from prefill_bench import torch_gpu

    now, capturing, replayed = [0.0], [], []

    class Graph:
        def capture_begin(self) -> None:
            self.ran: list[float] = []
            capturing.append(self)

        def capture_end(self) -> None:
            capturing.remove(self)

        def replay(self) -> None:
            now[0] += sum(self.ran)
            replayed.append(len(self.ran))

    class Event:
        def __init__(self, **_: Any) -> None:
            self.at = 0.0

        def record(self, _stream: Any) -> None:
            self.at = now[0]

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: "Event") -> float:
            return (end.at - self.at) * 1e3

    def side(seconds: float) -> Any:
        return lambda _i: capturing and capturing[-1].ran.append(seconds)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: nullcontext())
    gpu = torch_gpu.TorchGpu.__new__(torch_gpu.TorchGpu)
    gpu.stream = SimpleNamespace(synchronize=lambda: None)
    seconds = gpu.alternate({"short": (side(1e-5), 4), "long": (side(1e-2), 3), "medium": (side(1e-4), 1)})
    assert {name: len(each) for name, each in seconds.items()} == dict.fromkeys(seconds, torch_gpu.ROUNDS)
    for name, expected in (("short", 1e-5), ("long", 1e-2), ("medium", 1e-4)):
        assert seconds[name] == pytest.approx([expected] * torch_gpu.ROUNDS)
    turns = replayed[6:]  # two of each side find out how long a replay takes
    short, long, medium = turns[:3]
    assert (short % 4, long, medium) == (0, 3, 15)
    assert short * 1e-5 == pytest.approx(torch_gpu.GRAPH_SECONDS, rel=0.1)
    assert turns[3:9] == [long, medium, short, medium, short, long]


# --- compiled beforehand ---------------------------------------------------------------------------------------------


def test_machine_code_of_another_machine_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefill_bench import compiled

    here, carried = tmp_path / "here" / "cuda-0123", tmp_path / "carried" / "compiled" / "cuda-0123"
    here.mkdir(parents=True)
    carried.mkdir(parents=True)
    monkeypatch.setattr(jit, "cache_folder", lambda _target: here)
    capability = compiled.H200.capability
    first, second = compiled.specs_of([Case("ceilings"), Case("ceilings")], compiled.H200)
    with monkeypatch.context() as other:
        other.setattr(jit, "cache_folder", lambda _target: carried)
        other.setattr(build, "compilers", lambda: "other versions")
        made = build.cache_path(first, capability)
        build.write_cached(made, b"machine code")
    assert compiled.adopt(tmp_path / "carried") == 1
    assert build.read_cached(build.cache_path(first, capability)) == b"machine code"
    assert build.read_cached(build.cache_path(second, capability)) is None
    with pytest.raises(OptionError, match="other sources"):
        compiled.adopt(here.parent / "nothing")


def test_a_capability_without_kernels_is_refused() -> None:
    from prefill_bench.compiled import chip_with

    assert chip_with("8.9").capability == (8, 9)
    with pytest.raises(OptionError, match=r"--compile 7\.5"):
        chip_with("7.5")


# --- kernels ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(tiny: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """PyTorch on the CPU, and kernels as formulas."""
    pytest.importorskip("torch", reason="the side that kernels are compared with: pip install torch")
    from prefill_bench import projections

    monkeypatch.setattr(projections, "ROTATED_BYTES", 2e5)
    from modelled_gpu import ModelledGpu
    from prefill_bench.compiled import H200

    return ModelledGpu(H200)


@pytest.mark.parametrize("kind", ["qkv", "o", "gate_up", "down"])
def test_projections_are_checked_and_measured_beside_cublas(gpu: Any, kind: str) -> None:
    from prefill_bench.projections import ProjectionLab

    lab = ProjectionLab(gpu)
    measured = lab.measure(Case("projections", TINY, kind, 32, variants=True))
    assert set(measured.seconds) == {"cuBLAS", *measured.errors}
    tiles = {"tile 16", "tile 32"} - {measured.notes["plan of ours"]}
    tiles |= {"fp8 tile 16", "fp8 tile 32"} - {measured.notes["plan of fp8"]}
    tiles |= {"mma tile 16", "mma tile 32"}
    assert set(measured.errors) == {"ours", "fp8"} | tiles
    assert max(measured.errors.values()) < 5e-4
    assert measured.flop == 2 * 32 * lab._weights(Case("projections", TINY, kind)).exact.numel()
    assert set(lab.measure(Case("projections", TINY, kind, 16)).seconds) == {"ours", "fp8", "cuBLAS"}


def test_a_wrong_projection_or_one_with_other_bits_is_reported(gpu: Any) -> None:
    from prefill_bench.projections import ProjectionLab

    def damage(io: Any) -> None:
        io.residual.add_(len(gpu.launched))

    gpu.after_launch = damage
    measured = ProjectionLab(gpu).measure(Case("projections", TINY, "o", 16))
    assert measured.errors["ours"] > 0.1
    assert "other bits" in measured.notes["ours, bits"]


def test_attention_runs_in_chunks(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefill_bench import attention

    monkeypatch.setattr(attention, "CHUNK", 16)
    monkeypatch.setattr(attention, "rivals", lambda *_: {"flash": lambda _i: None})
    measured = attention.AttentionLab(gpu).measure(Case("attention", TINY, "causal", 48))
    assert gpu.launched[:3] == ["attention_chunk"] * 3
    assert measured.errors["ours"] < 1e-3
    assert "3 chunks" in measured.notes["plan"]
    g = PRESETS[TINY]
    assert measured.flop == 4 * g.q_dim * 48 * 49 / 2


def test_the_kernels_of_cases_can_be_compiled_beforehand(gpu: Any) -> None:
    from prefill_bench.compiled import specs_of
    from prefill_bench.projections import ProjectionLab

    case = Case("projections", TINY, "down", 32, variants=True)
    ProjectionLab(gpu).measure(case)
    assert {planned.spec for planned in gpu.loaded} == set(specs_of([case], gpu.chip))


def test_the_kernels_of_an_engine_can_be_compiled_beforehand() -> None:
    from prefill_bench.compiled import H200, specs_of

    def names(path: str, tokens: int) -> set[str]:
        return {spec.name for spec in specs_of([Case("ttft", "llama-3.2-3b", path, tokens)], H200)}

    (attention,) = specs_of([Case("attention", "llama-3.2-3b", "causal", 512)], H200)
    assert attention in specs_of([Case("ttft", "llama-3.2-3b", "gemm", 512)], H200)
    assert {"prepack", "argmax", "attention_chunk", "lm_head_x1"} <= names("gemm", 512)
    assert not any(name.startswith("qkv_x") for name in names("gemm", 2048 + 512))
    assert "qkv_x8" in names("gemm", 2048 + 5)  # a short rest runs in the GEMV kernels
    assert "persistent_x4" in names("gemm", 2048 + 3)  # a shorter one in the persistent kernel
    assert "qkv_x8" in names("gemv", 512)
    assert "attention_chunk" not in names("gemv", 512)
    assert "quantize_down_tiles" in names("fp8", 512) - names("gemm", 512)


def test_a_backend_without_gqa_gets_copied_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from prefill_bench import attention

    asked = []

    def attend(q: Any, k: Any, v: Any, *, is_causal: bool, enable_gqa: bool) -> None:
        asked.append((q.shape[1], k.shape[1], v.shape[1], is_causal, enable_gqa))
        if enable_gqa:
            raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    operands = [torch.zeros(5, width) for width in (64, 32, 32)]
    assert set(attention.rivals(*operands, 16)) == {"flash", "cuDNN"}
    assert asked == [(4, 2, 2, True, True), (4, 4, 4, True, False)] * 2

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fail)
    with pytest.raises(RuntimeError, match="illegal"):
        attention.rivals(*operands, 16)
