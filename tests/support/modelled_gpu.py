"""The GPU of bench_prefill.py's kernels without a GPU: PyTorch's tensors on the CPU, kernels as NumPy formulas.

Formulas are those of the kernels' documentation. Timings are made up.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from numba_atomflow.ops.activation import silu_reference
from numba_atomflow.ops.attention import attend_reference
from numba_atomflow.ops.cuda.attention.prefill import PrefillAttentionArguments
from numba_atomflow.ops.cuda.gemm import arguments as gemm
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.layout.weights import prepack_reference, unpack_reference
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.ops.cuda.runtime.spec import Planned
from numba_atomflow.ops.cuda.token.rms_norm import RmsNormTilesArguments
from numba_atomflow.ops.fp8 import dequantize_groups
from numba_atomflow.ops.rms_norm import rms_norm_reference
from numba_atomflow.ops.rope import rope_reference


class ModelledLaunch:
    """A launch: `run` computes what the kernel would."""

    def __init__(self, gpu: "ModelledGpu", spec: Any, arguments: Any) -> None:
        self._gpu, self._spec, self._arguments = gpu, spec, arguments

    def run(self) -> None:
        self._gpu.launched.append(self._spec.name)
        _FORMULAS[self._spec.signature](dict(self._spec.arguments), self._arguments)
        self._gpu.after_launch(self._arguments)


class ModelledGpu:
    """In place of `TorchGpu`.

    Attributes:
        after_launch: called with a kernel's arguments after it has run: may damage a result.
    """

    device = "cpu"

    def __init__(self, chip: Chip) -> None:
        self.chip = chip
        self.loaded: list[Planned] = []
        self.launched: list[str] = []
        self.after_launch: Callable[[Any], None] = lambda _arguments: None

    def load(self, *planned: Planned) -> None:
        self.loaded += planned

    def launch(self, planned: Planned, arguments: Mapping[str, Any], ctas: int = 0) -> ModelledLaunch:
        assert ctas or planned.ctas, "a grid of no CTAs"
        signature: Any = planned.spec.signature
        return ModelledLaunch(self, planned.spec, signature(**{name: arguments[name] for name in signature._fields}))

    def run(self, launch: ModelledLaunch) -> None:
        launch.run()

    def prepack(self, codes: torch.Tensor, scales: torch.Tensor, layout: Any) -> torch.Tensor:
        rows = layout.out_features
        words = prepack_reference(codes.numpy().reshape(rows, -1), scales.numpy().reshape(rows, -1), layout)
        return torch.from_numpy(words.view(np.int32))

    def alternate(self, sides: Mapping[str, tuple[Callable[[int], object], int]]) -> dict[str, list[float]]:
        for run, copies in sides.values():
            for i in range(copies):
                run(i)
        return {name: [1e-6 * (i + 1)] * 3 for i, name in enumerate(sides)}


def modelled_launch(planned: Planned, arguments: Any, ctas: int = 0) -> None:
    """In place of `device_launch.launch_planned`: NumPy's arrays are changed in place."""
    assert ctas or planned.ctas, "a grid of no CTAs"
    types = {"uint16": np.float16, "uint32": np.int32}
    tensors = {
        name: torch.from_numpy(value.view(types.get(value.dtype.name, value.dtype)))
        if isinstance(value, np.ndarray)
        else value
        for name, value in arguments._asdict().items()
    }
    signature, options = planned.spec.signature, dict(planned.spec.arguments)
    io = SimpleNamespace(**tensors)
    if signature is RmsNormTilesArguments:
        _norm(options, io, ctas)
    else:
        _FORMULAS[signature](options, io)


# --- formulas --------------------------------------------------------------------------------------------------------


def _product(options: dict[str, Any], io: Any) -> NDArray[np.float64]:
    """X W^T of the tokens that the launch computes; FP8 activations with their scales."""
    plan = options["plan"]
    codes, scales = unpack_reference(io.weights.numpy().view(np.uint32), plan.layout)
    x = plan.x.unpack(io.x.numpy().view(np.uint32))[: io.token_tiles * plan.tile_tokens]
    product: NDArray[np.float64] = x.astype(np.float64) @ dequantize_groups(codes, scales).astype(np.float64).T
    return product


def _write_tiles(tiles: ActivationTiles, words: torch.Tensor, rows: NDArray[np.float64]) -> None:
    """Replace the first tokens of tiled activations; not the padding of K."""
    padded = replace(tiles, in_features=tiles.blocks * tiles.block_elements)
    x = padded.unpack(words.numpy().view(np.uint32))
    x[: len(rows), : rows.shape[1]] = rows
    words.copy_(torch.from_numpy(padded.pack(x).view(np.int32)))


def _norm(options: dict[str, Any], io: Any, tokens: int) -> None:
    tiles, residual = options["x"], io.residual.numpy().astype(np.float64)
    rows = rms_norm_reference(residual[:tokens], io.norm_weight.numpy().astype(np.float64), options["eps"])
    padding = tiles.blocks * tiles.block_elements - tiles.in_features
    _write_tiles(tiles, io.x, np.pad(rows, ((0, 0), (0, padding))))


def _store(options: dict[str, Any], io: Any) -> None:
    product = _product(options, io)
    io.y[: len(product)] = torch.from_numpy(product)


def _add(options: dict[str, Any], io: Any) -> None:
    product = _product(options, io)
    io.residual[: len(product)] += torch.from_numpy(product)


def _swiglu(options: dict[str, Any], io: Any) -> None:
    product, tiles = _product(options, io), options["intermediate"]
    gate, up = np.split(product, 2, axis=1)
    _write_tiles(tiles, io.intermediate, silu_reference(gate) * up)


def _qkv(options: dict[str, Any], io: Any) -> None:
    product, count, position = _product(options, io), int(io.count[0]), int(io.position[0])
    dim, heads, kv_heads = 2 * io.cosines.shape[1], options["heads"], options["kv_heads"]
    parts = np.split(product[:count], [heads * dim, (heads + kv_heads) * dim], axis=1)
    angles = [table.numpy()[position : position + count].astype(np.float64) for table in (io.cosines, io.sines)]
    for i in range(2):
        parts[i] = rope_reference(parts[i].reshape(count, -1, dim), *angles).reshape(count, -1)
    io.q[:count] = torch.from_numpy(parts[0])
    io.keys[position : position + count] = torch.from_numpy(parts[1])
    io.values[position : position + count] = torch.from_numpy(parts[2])


def _attention(options: dict[str, Any], io: Any) -> None:
    plan, count, position = options["plan"], int(io.count[0]), int(io.position[0])
    q, keys, values = (tensor.numpy().astype(np.float64) for tensor in (io.q, io.keys, io.values))
    out = attend_reference(q[:count], keys, values, position, plan.head_dim)
    _write_tiles(plan.out, io.out, out)


_FORMULAS: dict[Any, Callable[[dict[str, Any], Any], None]] = {
    gemm.GemmStoreArguments: _store,
    gemm.GemmAddArguments: _add,
    gemm.GemmSwigluArguments: _swiglu,
    gemm.GemmQkvArguments: _qkv,
    PrefillAttentionArguments: _attention,
}
