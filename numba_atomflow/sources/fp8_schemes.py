"""The FP8 checkpoints of the hubs: which schemes there are, and how their scales become group scales without loss.

All of them store a projection as E4M3 codes [N, K] and multipliers: one for the whole tensor, one per row, one per
block of rows and columns, or one per group of columns in each row. The engine's own scales are one per row and 128
columns: the same numbers, repeated. So codes stay as they are, and ``code * scale`` is the same float32 as before.

Sources: https://github.com/vllm-project/compressed-tensors (`compressed-tensors`), and in transformers
`integrations/fbgemm_fp8.py` (`fbgemm_fp8`) and `integrations/finegrained_fp8.py` (`fp8`, whose ``weight_scale_inv`` is
a multiplier, in spite of its name). Where blocks do not divide a weight, the last ones are short.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.errors import SourceError
from numba_atomflow.files.untrusted import short, shown
from numba_atomflow.geometry import GROUP, LARGEST_COUNT
from numba_atomflow.sources.json_file import unusable

_BLOCK = re.compile(r"([0-9]{1,9})x([0-9]{1,9})")  # "128x128"
ALL = 0  # in a block: all rows, or all columns
Block = tuple[int, int]  # rows and columns that share a multiplier
PER_TENSOR, PER_ROW = (ALL, ALL), (1, ALL)

SUPPORTED = "compressed-tensors, fbgemm_fp8 and fp8"
# Scales of activations and of the KV cache, which are not quantised to 8 bits here.
OF_NO_USE = ("input_scale", "activation_scale", "input_scale_ub", "output_scale", "q_scale", "k_scale", "v_scale")


@dataclass(frozen=True)
class Fp8Scheme:
    """How a folder stores its FP8 weights.

    Attributes:
        method: ``quant_method`` in config.json.
        blocks: what shares a multiplier; several where groups of layers differ.
        suffixes: ends of the names under which multipliers are stored, instead of ``weight``.
    """

    method: str
    blocks: tuple[Block, ...]
    suffixes: tuple[str, ...] = ("weight_scale",)

    def __str__(self) -> str:
        return f"{self.method} {' or '.join(map(_block_name, self.blocks))}"

    def scale_of(self, name: str) -> str | None:
        """The weight that a tensor of this name has the multipliers of, or None."""
        stem, _, last = name.rpartition(".")
        return f"{stem}.weight" if last in self.suffixes else None

    def block_of(self, shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> Block | None:
        """The block whose multipliers, for a weight of `shape` [N, K], have the shape `scale_shape`; None: no block."""
        for block in self.blocks:
            # Axes of length 1 may be left out from the end: (N, 1) is (N,) as well, and (1, 1) is (1,) and ().
            spelling: tuple[int, ...] = grid_of(shape, block)
            while spelling != scale_shape and spelling[-1:] == (1,):
                spelling = spelling[:-1]
            if spelling == scale_shape:
                return block
        return None

    def shapes_for(self, shape: tuple[int, ...]) -> str:
        """The shapes that multipliers of a weight may have, for messages."""
        return " or ".join(str(list(grid_of(shape, block))) for block in self.blocks)


def grid_of(shape: tuple[int, ...], block: Block) -> tuple[int, int]:
    """Blocks along N and along K; the last ones may be short."""
    rows, columns = (1 if step == ALL else -(-size // step) for size, step in zip(shape, block, strict=True))
    return rows, columns


def group_scales(grid: NDArray[np.float32], block: Block, rows: range, columns: int) -> NDArray[np.float32]:
    """The multipliers of some rows, repeated for every group.

    Args:
        grid: float32, one for each block.
        block: what they are shared by.
        rows: of the weight.
        columns: of the weight: K.

    Returns:
        float32 [len(rows), ceil(K / 128)].
    """
    block_rows, block_columns = block
    row = np.arange(rows.start, rows.stop)
    group = np.arange(-(-columns // GROUP))
    row = np.zeros_like(row) if block_rows == ALL else row // block_rows
    group = np.zeros_like(group) if block_columns == ALL else group * GROUP // block_columns
    return grid[np.ix_(row, group)]


def decode_e8m0(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Powers of two, 2^(code - 127); 255 is NaN (OCP Microscaling Formats specification, 5.4.1)."""
    ones = np.where(codes == 255, np.float32(np.nan), np.float32(1))
    return np.ldexp(ones, codes.astype(np.int32) - 127)


# --- config.json -------------------------------------------------------------------------------------------------


def scheme_of(path: Path, quantisation: Mapping[str, Any]) -> Fp8Scheme:
    """The scheme that ``quantization_config`` of the config.json at `path` describes.

    Raises:
        SourceError: it is none that this program knows, or one that groups of 128 cannot hold.
    """
    method = quantisation.get("quant_method", "unknown")
    match method:
        case "compressed-tensors":
            return _compressed_tensors(path, quantisation)
        case "fbgemm_fp8":
            return Fp8Scheme(method, (PER_ROW,))
        case "fp8":
            return _fp8(path, quantisation)
    raise SourceError(
        f"{path} is quantised by {shown(method)}, which cannot be read (supported are {SUPPORTED}); "
        "give the unquantised model."
    )


def _fp8(path: Path, quantisation: Mapping[str, Any]) -> Fp8Scheme:
    kind = quantisation.get("fmt") or "e4m3"
    if kind not in ("e4m3", "e4m3fn", "float8_e4m3fn"):
        raise SourceError(f"{path} is quantised to the FP8 format {shown(kind)}; only 'e4m3' is supported.")
    blocks: tuple[Block, ...] = (PER_TENSOR, (GROUP, GROUP))  # unsaid: AutoFP8's, and transformers' default
    if "weight_block_size" in quantisation:
        block = quantisation["weight_block_size"]
        blocks = (PER_TENSOR if block is None else _block(path, "weight_block_size", block),)
    return Fp8Scheme("fp8", blocks, ("weight_scale_inv", "weight_scale"))


def _compressed_tensors(path: Path, quantisation: Mapping[str, Any]) -> Fp8Scheme:
    for key in ("sparsity_config", "transform_config"):
        extra = quantisation.get(key) or {}
        if extra and (not isinstance(extra, dict) or extra.get("format") != "dense"):
            raise SourceError(f"{path} is quantised with a {key}, which is not supported; give the unquantised model.")
    groups = quantisation.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise SourceError(f"{path} has an unusable value for config_groups: {shown(groups)}.")
    blocks: list[Block] = []
    for group in groups.values():
        stored = group.get("format") or quantisation.get("format")
        weights = group.get("weights")
        kind = _kind(weights)
        if stored not in ("float-quantized", "naive-quantized") or kind != "8-bit float":
            raise SourceError(
                f"{path} stores {kind} weights as {shown(stored)} (compressed-tensors); of that method, only 8-bit "
                "float ones as 'float-quantized' are supported."
            )
        blocks.append(_strategy(path, weights))
    return Fp8Scheme("compressed-tensors", tuple(dict.fromkeys(blocks)))


def _kind(weights: Any) -> str:
    if not isinstance(weights, dict):
        return "unquantised"
    asymmetric = "" if weights.get("symmetric", True) else "asymmetric "
    bits, number = weights.get("num_bits"), weights.get("type")
    if type(bits) is int and isinstance(number, str):
        return f"{asymmetric}{shown(bits)}-bit {short(number)}"
    return f"{asymmetric}num_bits {shown(bits)}, type {shown(number)}"


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
        f"{path} has weights quantised by the strategy {shown(weights.get('strategy'))}, which is not supported."
    )


def _block(path: Path, key: str, value: Any) -> Block:
    if isinstance(value, str) and (sizes := _BLOCK.fullmatch(value)):  # as early compressed-tensors wrote
        value = [int(size) for size in sizes.groups()]
    sound = isinstance(value, list) and len(value) == 2 and all(type(size) is int for size in value)
    if not sound or not all(0 < size <= LARGEST_COUNT for size in value):
        raise unusable(path, key, value)
    if value[1] % GROUP:
        raise SourceError(
            f"{path} has a scale for every {value[1]} columns ({key}); only multiples of {GROUP} become groups of "
            f"{GROUP} without loss, so give the unquantised model."
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
