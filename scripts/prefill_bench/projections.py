"""Projections of many tokens, as they run in a model: with their epilogues, against cuBLAS in float16.

Our side does more than cuBLAS's: it also rotates and writes the KV cache (qkv), adds to the residual (o, down), or
gates (gate_up). Its results are compared with float64 before anything is timed.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from numba_atomflow.geometry import ModelGeometry, rope_inverse_frequencies
from numba_atomflow.model.presets import find_preset
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.rope import rope_table
from prefill_bench.cases import Case, Measured
from prefill_bench.gemm_kernels import GemmVariant, gemm_layout, gemm_variants, output_tiles
from prefill_bench.torch_gpu import (
    ROTATED_BYTES,
    dequantize,
    pack_fp8_tiles,
    pack_tiles,
    quantize,
    relative_error,
    unpack_tiles,
)

OURS, FP8, CUBLAS = "ours", "fp8", "cuBLAS"
_CHECKED_TOKENS = 256
_NAN_WORD = -1  # bits of NaN, in every type


@dataclass(frozen=True)
class Weights:
    """A projection's weights on the GPU, in copies.

    Attributes:
        prepacked: for our kernels. halves: float16 [N, K], for cuBLAS. exact: float64 [N, K].
    """

    prepacked: list[torch.Tensor]
    halves: list[torch.Tensor]
    exact: torch.Tensor


class ProjectionLab:
    """Measures projections; keeps the weights of the last one."""

    def __init__(self, gpu: Any) -> None:
        self._gpu = gpu
        self._kept: tuple[tuple[str, str], Weights] | None = None

    def measure(self, case: Case) -> Measured:
        """Seconds, errors and plans of a projection at a number of tokens."""
        gpu, geometry = self._gpu, find_preset(case.model)
        weights = self._weights(case)
        variants = gemm_variants(geometry, case.subject, case.tokens, gpu.chip)
        chosen = [variant for variant in variants if variant.chosen or case.variants]
        gpu.load(*(variant.planned for variant in chosen))
        x = torch.randn(case.tokens, weights.exact.shape[1], device=gpu.device).half()
        sides: dict[str, Any] = {}
        product = torch.empty(case.tokens, weights.exact.shape[0], device=gpu.device, dtype=torch.float16)
        halves = weights.halves

        def cublas(i: int) -> None:
            torch.mm(x, halves[i % len(halves)].T, out=product)

        sides[CUBLAS] = cublas, len(halves)
        errors, notes = {}, {}
        for variant in chosen:
            fp8 = variant.plan.x.bits == 8
            name = variant.name if not variant.chosen else FP8 if fp8 else OURS
            buffers = _Buffers(geometry, case, variant, gpu.device)
            buffers.values["x"], multiplied = _activations(variant.plan.x, x)
            launches = [gpu.launch(variant.planned, buffers.values | {"weights": words}) for words in weights.prepacked]
            errors[name], same = _check(gpu, launches[0], buffers, multiplied, weights.exact)
            if not same:
                notes[f"{name}, bits"] = f"{name}: other bits in a second run"
            sides[name] = (lambda i, launches=launches: launches[i % len(launches)].run()), len(launches)
            if variant.chosen:
                notes[f"plan of {name}"] = variant.name
        flop = 2.0 * case.tokens * weights.exact.numel()
        return Measured(gpu.alternate(sides), flop, errors, notes=notes)

    def _weights(self, case: Case) -> Weights:
        key = case.model, case.subject
        if self._kept is None or self._kept[0] != key:
            self._kept = None
            self._kept = key, self._make_weights(case)
        return self._kept[1]

    def _make_weights(self, case: Case) -> Weights:
        gpu = self._gpu
        layout = gemm_layout(find_preset(case.model), case.subject, gpu.chip)
        rows, columns = layout.out_features, layout.in_features
        codes, scales = quantize(torch.randn(rows, columns, device=gpu.device) / math.sqrt(columns))
        words = gpu.prepack(codes.reshape(-1), scales.reshape(-1), layout)
        half = dequantize(codes, scales, torch.float32).half()
        copies = [math.ceil(ROTATED_BYTES / (size * rows * columns)) for size in (1, 2)]
        return Weights(
            [words, *(words.clone() for _ in range(copies[0] - 1))],
            [half, *(half.clone() for _ in range(copies[1] - 1))],
            dequantize(codes, scales, torch.float64),
        )

    def close(self) -> None:
        """Free the weights."""
        self._kept = None


class _Buffers:
    """What a GEMM kernel reads and writes, by the names of its parameters.

    Args:
        device: PyTorch's name.
    """

    def __init__(self, geometry: ModelGeometry, case: Case, variant: GemmVariant, device: str) -> None:
        self.geometry, self.kind, self.variant = geometry, case.subject, variant
        g, plan, tokens = geometry, variant.plan, case.tokens
        padded = plan.x.tokens  # room for as many tokens as x has

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        cosines, sines = (
            torch.as_tensor(table, device=device) for table in rope_table(rope_inverse_frequencies(g), padded)
        )
        self.values: dict[str, torch.Tensor | int] = {
            "partials": torch.zeros(plan.partials, dtype=torch.float32, device=device),
            "y": empty(padded, plan.layout.out_features, dtype=torch.float32),
            "residual": empty(padded, g.hidden, dtype=torch.float32),
            "count": torch.tensor([tokens], dtype=torch.int64, device=device),
            "position": torch.zeros(1, dtype=torch.int64, device=device),
            "cosines": cosines,
            "sines": sines,
            "q": empty(padded, g.q_dim, dtype=torch.float16),
            "keys": empty(padded, g.kv_dim, dtype=torch.float16),
            "values": empty(padded, g.kv_dim, dtype=torch.float16),
            "intermediate": empty(output_tiles(g, plan).words, dtype=torch.int32),
            "token_tiles": -(-tokens // plan.tile_tokens),
        }

    def outputs(self) -> list[torch.Tensor]:
        """The tensors that the kernel writes."""
        names = {"qkv": ("q", "keys", "values"), "gate_up": ("intermediate",)}.get(self.kind, ("residual",))
        return [tensor for name in names if isinstance(tensor := self.values[name], torch.Tensor)]

    def poison(self) -> None:
        """Fill outputs with NaN; a residual, which is added to, with ones."""
        for tensor in self.outputs():
            if self.kind in ("o", "down"):
                tensor.fill_(1.0)
            else:
                tensor.view(torch.int16 if tensor.dtype == torch.float16 else tensor.dtype).fill_(_NAN_WORD)

    def results(self, tokens: list[int]) -> torch.Tensor:
        """What the kernel has written for some tokens, side by side."""
        match self.kind:
            case "gate_up":
                return unpack_tiles(output_tiles(self.geometry, self.variant.plan), self.outputs()[0], tokens)
            case "qkv":
                return torch.cat([tensor[tokens] for tensor in self.outputs()], 1)
        return self.outputs()[0][tokens]

    def expected(self, product: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        """The same in float64, from X W^T of these tokens."""
        g = self.geometry
        match self.kind:
            case "gate_up":
                gate, up = product.split(g.ffn, 1)
                return torch.nn.functional.silu(gate) * up
            case "qkv":
                q, k, v = product.split([g.q_dim, g.kv_dim, g.kv_dim], 1)
                tables = self.values["cosines"], self.values["sines"]
                cosines, sines = (table[tokens].double() for table in tables if isinstance(table, torch.Tensor))
                return torch.cat([_rotate(q, cosines, sines), _rotate(k, cosines, sines), v], 1)
        return product + 1.0


def _activations(tiles: ActivationTiles, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Words of x, float16 [tokens, K], and what they stand for."""
    if tiles.bits == 16:
        return pack_tiles(tiles, x), x
    codes, scales = quantize(x.float())
    return pack_fp8_tiles(tiles, codes, scales), dequantize(codes, scales, torch.float32)


def _rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """RoPE of heads [T, heads * head_dim] (`ops.rope.rope_reference`)."""
    half = cosines.shape[1]
    heads = x.view(x.shape[0], -1, 2 * half)
    low, high = heads[..., :half], heads[..., half:]
    c, s = cosines[:, None, :], sines[:, None, :]
    return torch.cat([low * c - high * s, high * c + low * s], -1).view(x.shape)


def _check(gpu: Any, launch: Any, buffers: _Buffers, x: torch.Tensor, exact: torch.Tensor) -> tuple[float, bool]:
    """Relative L2 error of some tokens against float64, and whether a second run has the same bits."""
    count = len(x)
    picked = sorted(torch.randperm(count)[:_CHECKED_TOKENS].tolist())
    results = []
    for _ in range(2):
        buffers.poison()
        gpu.run(launch)
        results.append(buffers.results(picked).clone())
    expected = buffers.expected(x[picked].double() @ exact.T, picked)
    return relative_error(results[0], expected), bool(torch.equal(results[0], results[1]))
