"""FP8 schemes of published models, and their lossless conversion to group scales.

All schemes store a projection as E4M3 codes [N, K] and scales: per tensor, per row, per block of rows and columns, or
per group of columns in each row. The engine's scales are per row and group of 128 columns: the same values, repeated.
Codes are unchanged, and ``code * scale`` is the same float32.

Sources: https://github.com/vllm-project/compressed-tensors (`compressed-tensors`), and in transformers
`integrations/fbgemm_fp8.py` (`fbgemm_fp8`) and `integrations/finegrained_fp8.py` (`fp8`, whose ``weight_scale_inv`` is
the scale itself, not its inverse). The last block of a row or column may be partial.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.errors import SourceError
from numba_atomflow.files.untrusted import quote, short
from numba_atomflow.geometry import GROUP
from numba_atomflow.rope_scaling import LARGEST_COUNT
from numba_atomflow.sources.json_file import unusable

_BLOCK = re.compile(r"([0-9]{1,9})x([0-9]{1,9})")  # "128x128"
FULL_AXIS = 0  # in a block: all rows, or all columns
Block = tuple[int, int]  # rows and columns that share a scale
PER_TENSOR, PER_ROW = (FULL_AXIS, FULL_AXIS), (1, FULL_AXIS)

SUPPORTED = "compressed-tensors, fbgemm_fp8 and fp8"
# Scales of activations and of the KV cache, which the engine does not quantize to 8 bits.
UNUSED_SCALES = ("input_scale", "activation_scale", "input_scale_ub", "output_scale", "q_scale", "k_scale", "v_scale")


@dataclass(frozen=True)
class Fp8Scheme:
    """The FP8 scheme of a model folder.

    Attributes:
        method: ``quant_method`` in config.json.
        blocks: that share a scale; several if layers differ.
        suffixes: of the names of scales, in place of ``weight``.
    """

    method: str
    blocks: tuple[Block, ...]
    suffixes: tuple[str, ...] = ("weight_scale",)

    def __str__(self) -> str:
        return f"{self.method} {' or '.join(map(_block_name, self.blocks))}"

    def scale_of(self, name: str) -> str | None:
        """The weight whose scales are in the tensor of this name, or None."""
        stem, _, last = name.rpartition(".")
        return f"{stem}.weight" if last in self.suffixes else None

    def block_of(self, shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> Block | None:
        """The block for which scales of a weight of `shape` [N, K] have the shape `scale_shape`, or None."""
        for block in self.blocks:
            # Trailing axes of length 1 may be omitted: (N, 1) may be (N,), and (1, 1) may be (1,) or ().
            grid: tuple[int, ...] = grid_of(shape, block)
            while grid != scale_shape and grid[-1:] == (1,):
                grid = grid[:-1]
            if grid == scale_shape:
                return block
        return None

    def shapes_for(self, shape: tuple[int, ...]) -> str:
        """The valid shapes of a weight's scales, for messages."""
        return " or ".join(str(list(grid_of(shape, block))) for block in self.blocks)


def grid_of(shape: tuple[int, ...], block: Block) -> tuple[int, int]:
    """Number of blocks along N and along K."""
    rows, columns = (1 if step == FULL_AXIS else -(-size // step) for size, step in zip(shape, block, strict=True))
    return rows, columns


def group_scales(grid: NDArray[np.float32], block: Block, rows: range, columns: int) -> NDArray[np.float32]:
    """Scales of a range of rows, repeated for every group.

    Args:
        grid: float32, one scale per block.
        block: rows and columns of a block.
        rows: of the weight.
        columns: K of the weight.

    Returns:
        float32 [len(rows), ceil(K / 128)].
    """
    block_rows, block_columns = block
    row = np.arange(rows.start, rows.stop)
    group = np.arange(-(-columns // GROUP))
    row = np.zeros_like(row) if block_rows == FULL_AXIS else row // block_rows
    group = np.zeros_like(group) if block_columns == FULL_AXIS else group * GROUP // block_columns
    return grid[np.ix_(row, group)]


def dequantize_e8m0(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Powers of two, 2^(code - 127); 255 is NaN (OCP Microscaling Formats specification, 5.4.1)."""
    ones = np.where(codes == 255, np.float32(np.nan), np.float32(1))
    return np.ldexp(ones, codes.astype(np.int32) - 127)


# --- config.json -------------------------------------------------------------------------------------------------


def scheme_of(path: Path, quantization: Mapping[str, Any]) -> Fp8Scheme:
    """The scheme of ``quantization_config`` in the config.json at `path`.

    Raises:
        SourceError: the scheme is not supported, or cannot be expressed in groups of 128.
    """
    method = quantization.get("quant_method", "unknown")
    match method:
        case "compressed-tensors":
            return _compressed_tensors(path, quantization)
        case "fbgemm_fp8":
            return Fp8Scheme(method, (PER_ROW,))
        case "fp8":
            return _fp8(path, quantization)
    raise SourceError(
        f"{path} is quantized by {quote(method)}, which cannot be read (supported are {SUPPORTED}); "
        "give the unquantized model."
    )


def _fp8(path: Path, quantization: Mapping[str, Any]) -> Fp8Scheme:
    kind = quantization.get("fmt") or "e4m3"
    if kind not in ("e4m3", "e4m3fn", "float8_e4m3fn"):
        raise SourceError(f"{path} is quantized to the FP8 format {quote(kind)}; only 'e4m3' is supported.")
    blocks: tuple[Block, ...] = (
        PER_TENSOR,
        (GROUP, GROUP),
    )  # default: AutoFP8's, or transformers'
    if "weight_block_size" in quantization:
        block = quantization["weight_block_size"]
        blocks = (PER_TENSOR if block is None else _block(path, "weight_block_size", block),)
    return Fp8Scheme("fp8", blocks, ("weight_scale_inv", "weight_scale"))


def _compressed_tensors(path: Path, quantization: Mapping[str, Any]) -> Fp8Scheme:
    for key in ("sparsity_config", "transform_config"):
        extra = quantization.get(key) or {}
        if extra and (not isinstance(extra, dict) or extra.get("format") != "dense"):
            raise SourceError(f"{path} is quantized with a {key}, which is not supported; give the unquantized model.")
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise SourceError(f"{path} has an unusable value for config_groups: {quote(groups)}.")
    blocks: list[Block] = []
    for group in groups.values():
        stored = group.get("format") or quantization.get("format")
        weights = group.get("weights")
        kind = _kind(weights)
        if stored not in ("float-quantized", "naive-quantized") or kind != "8-bit float":
            raise SourceError(
                f"{path} stores {kind} weights as {quote(stored)} (compressed-tensors); of that method, only 8-bit "
                "float ones as 'float-quantized' are supported."
            )
        blocks.append(_strategy(path, weights))
    return Fp8Scheme("compressed-tensors", tuple(dict.fromkeys(blocks)))


def _kind(weights: Any) -> str:
    if not isinstance(weights, dict):
        return "unquantized"
    asymmetric = "" if weights.get("symmetric", True) else "asymmetric "
    bits, number = weights.get("num_bits"), weights.get("type")
    if type(bits) is int and isinstance(number, str):
        return f"{asymmetric}{quote(bits)}-bit {short(number)}"
    return f"{asymmetric}num_bits {quote(bits)}, type {quote(number)}"


def _strategy(path: Path, weights: Mapping[str, Any]) -> Block:
    match weights.get("strategy"):
        case "tensor":
            return PER_TENSOR
        case "channel":
            return PER_ROW
        case "block":
            return _block(path, "block_structure", weights.get("block_structure"))
        case "group":
            return _block(path, "group_size", [1, weights.get("group_size")])
    raise SourceError(
        f"{path} has weights quantized by the strategy {quote(weights.get('strategy'))}, which is not supported."
    )


def _block(path: Path, key: str, value: Any) -> Block:
    if isinstance(value, str) and (sizes := _BLOCK.fullmatch(value)):  # format of early compressed-tensors
        value = [int(size) for size in sizes.groups()]
    valid = isinstance(value, list) and len(value) == 2 and all(type(size) is int for size in value)
    if not valid or not all(0 < size <= LARGEST_COUNT for size in value):
        raise unusable(path, key, value)
    if value[1] % GROUP:
        raise SourceError(
            f"{path} has a scale for every {value[1]} columns ({key}); only multiples of {GROUP} become groups of "
            f"{GROUP} without loss, so give the unquantized model."
        )
    return value[0], value[1]


def _block_name(block: Block) -> str:
    match block:
        case (0, 0):
            return "per tensor"
        case (1, 0):
            return "per channel"
        case (1, columns):
            return f"in groups of {columns}"
    return f"in blocks of {block[0]} x {block[1]}"
