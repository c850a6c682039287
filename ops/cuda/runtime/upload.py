"""Weights from the mapped checkpoint to prepacked weights in device memory.

Each projection is copied in pieces from the mapping to a staging area, the memory after the weights that the KV cache
and activations use later, and is prepacked from there: no second copy of the weights, on the host or the device. Random
codes, which repeat a pool, are made on the device of a copy of the pool at the end of the staging area.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.device.driver import call
from numba_atomflow.ops.cuda.layout.prepack import prepack_arguments, prepack_ctas
from numba_atomflow.ops.cuda.layout.weights import TILE_ROWS, PrepackedLayout
from numba_atomflow.ops.cuda.runtime.launch import DeviceArray, Kernel, Launch
from numba_atomflow.utils.progress import Progress
from numba_atomflow.utils.repeated import RepeatedBytes

ALIGNMENT = 128  # bytes, of what is staged
_MAX_PIECE_BYTES = 64 << 20  # small enough that the progress bar moves
Matrix = NDArray[Any] | RepeatedBytes


@runtime_checkable
class WeightSource(Protocol):
    """A checkpoint's arrays by name, with more than a mapping tells."""

    def repeated(self, name: str) -> RepeatedBytes | None:
        """The array, if it repeats a pool of bytes."""

    def release(self, name: str) -> None:
        """The array has been copied, and its memory on the host is not needed any more."""


def stored_matrices(arrays: Mapping[str, NDArray[Any]], part: str) -> list[Matrix]:
    """A projection, or the embedding, as the checkpoint has it: codes and scales, or float16 weights alone."""
    matrices: list[Matrix] = []
    for name in _matrix_names(arrays, part):
        codes = arrays.repeated(name) if isinstance(arrays, WeightSource) else None
        matrices.append(arrays[name] if codes is None else codes)
    return matrices


def release_matrices(arrays: Mapping[str, NDArray[Any]], part: str) -> None:
    """A projection, or the embedding, has been copied to the device."""
    if isinstance(arrays, WeightSource):
        for name in _matrix_names(arrays, part):
            arrays.release(name)


def _matrix_names(arrays: Mapping[str, NDArray[Any]], part: str) -> list[str]:
    return [name for name in (f"{part}.weight", f"{part}.scale") if name in arrays]


@dataclass(frozen=True)
class Piece:
    """A part of a projection that is copied and prepacked at once.

    Attributes:
        rows: ranges of the checkpoint's rows, concatenated for prepacking.
        layout: of the piece alone.
        first_tile: index of its first tile in the projection.
    """

    rows: tuple[slice, ...]
    layout: PrepackedLayout
    first_tile: int


def pieces(layout: PrepackedLayout, staging_bytes: int) -> Iterator[Piece]:
    """Divide a projection into pieces of at most `staging_bytes` bytes in the checkpoint.

    Raises:
        ValueError: not even the smallest piece fits.
    """
    row_bytes = layout.format.row_bytes(layout.in_features)
    fitting = (min(staging_bytes, _MAX_PIECE_BYTES) - ALIGNMENT) // row_bytes  # rows; scales begin at a multiple of it
    section = 2 * layout.half
    if not layout.half:
        step = fitting // TILE_ROWS * TILE_ROWS
        for first in range(0, layout.out_features, _positive(step)):
            last = min(first + step, layout.out_features)
            yield Piece((slice(first, last),), replace(layout, out_features=last - first), first // TILE_ROWS)
    elif fitting >= section:
        step = fitting // section * section
        for first in range(0, layout.out_features, step):
            last = min(first + step, layout.out_features)
            tile = first // section * layout.section_tiles
            yield Piece((slice(first, last),), replace(layout, out_features=last - first), tile)
    else:
        step = fitting // TILE_ROWS * 8  # pairs of rows
        for base in range(0, layout.out_features, section):
            for first in range(0, layout.half, _positive(step)):
                last = min(first + step, layout.half)
                ranges = tuple(slice(base + offset + first, base + offset + last) for offset in (0, layout.half))
                tile = base // section * layout.section_tiles + first // 8
                yield Piece(ranges, replace(layout, out_features=2 * (last - first), half=last - first), tile)


def _positive(step: int) -> int:
    if step <= 0:
        raise ValueError("the staging area is smaller than one tile of a projection")
    return step


@dataclass(frozen=True)
class _Span:
    """A range of device memory, as a kernel's argument."""

    address: int
    extent: int


class Uploader:
    """Copies weights to the device and prepacks them, through one staging area.

    Args:
        loaded: kernels by name. staging: address and bytes of the area. stream: of all copies and launches.
    """

    def __init__(self, loaded: Mapping[str, Kernel], staging: tuple[int, int], stream: Any) -> None:
        self._loaded, self._staging, self._stream = loaded, staging, stream
        self._pool: tuple[NDArray[np.uint8], int] | None = None  # and its address on the device

    def projection(
        self,
        layout: PrepackedLayout,
        parts: Sequence[Matrix],
        words: DeviceArray,
        progress: Callable[[int], None],
        rows: Sequence[slice] | None = None,
    ) -> None:
        """Copy and prepack a projection [N, K].

        Args:
            parts: codes uint8 [N, K] and scales float32 [N, groups]; or float16 [N, K] alone.
            words: the prepacked weights.
            progress: called with the bytes of each piece.
            rows: of `parts`, which make up the projection in this order; None: all.
        """
        spans = [slice(0, layout.out_features)] if rows is None else rows
        self._place_pool(parts)
        kernel = self._loaded["prepack" if layout.format.scaled else "prepack_fp16"]
        address, staging_bytes = self._staging
        for piece in pieces(layout, staging_bytes):
            staged, next_address = [], address
            for array in parts:
                staged.append(_Span(next_address, piece.layout.out_features * array.shape[1] * array.itemsize))
                for span in (span for local in piece.rows for span in rows_within(spans, local)):
                    self._copy(next_address, array[span])
                    next_address += array[span].nbytes
                next_address = -(-next_address // ALIGNMENT) * ALIGNMENT
            target = _Span(words.address + 4 * piece.first_tile * layout.tile_words, 4 * piece.layout.words)
            arguments = prepack_arguments(piece.layout, staged, target)
            Launch(kernel, prepack_ctas(piece.layout), arguments, self._stream).run()
            progress(sum(span.extent for span in staged))

    def vector(self, values: NDArray[np.float32], target: DeviceArray) -> None:
        """Copy a norm's weights or a bias."""
        self._copy(target.address, values)

    def _copy(self, address: int, values: Matrix) -> None:
        """From pageable memory: the driver has staged it when this returns. What repeats the pool: from there."""
        if isinstance(values, RepeatedBytes):
            if self._pool is not None and self._pool[0] is values.pool:
                for run in values.runs():
                    source, nbytes = self._pool[1] + run.start, run.stop - run.start
                    call("cuMemcpyDtoDAsync", address, source, nbytes, self._stream)
                    address += nbytes
                return
            values = values.array()
        if values.nbytes:
            call("cuMemcpyHtoDAsync", address, values.ctypes.data, values.nbytes, self._stream)

    def _place_pool(self, parts: Sequence[Matrix]) -> None:
        """Copy the pool that a part repeats to the end of the staging area, once, if that leaves enough of it."""
        pool = next((part.pool for part in parts if isinstance(part, RepeatedBytes)), None)
        if pool is None or self._pool is not None:
            return
        address, staging_bytes = self._staging
        left = (staging_bytes - len(pool)) // ALIGNMENT * ALIGNMENT
        if left >= len(pool):
            self._staging = address, left
            self._pool = pool, address + left
            call("cuMemcpyHtoDAsync", address + left, pool.ctypes.data, len(pool), self._stream)


def rows_within(spans: Sequence[slice], rows: slice) -> Iterator[slice]:
    """Where rows rows.start .. rows.stop - 1 are, counted over all spans, one after the other."""
    first = 0
    for span in spans:
        start, stop = max(span.start, span.start + rows.start - first), min(span.stop, span.start + rows.stop - first)
        if start < stop:
            yield slice(start, stop)
        first += span.stop - span.start


def upload(
    uploader: Uploader,
    arrays: Mapping[str, NDArray[Any]],
    targets: Mapping[str, DeviceArray],
    layout_of: Callable[[str], PrepackedLayout],
    progress: Progress | None,
) -> None:
    """Copy and prepack all weights.

    Args:
        arrays: the checkpoint's, by name. targets: device memory by the checkpoint's parts.
        progress: called with a text, MB done and MB in total.
    """
    total, done = sum(target.extent for target in targets.values()), 0

    def moved(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress("weights to the GPU", min(done, total) >> 20, total >> 20)

    for part, target in targets.items():
        if part in arrays:
            uploader.vector(arrays[part], target)
            continue
        uploader.projection(layout_of(part), stored_matrices(arrays, part), target, moved)
        release_matrices(arrays, part)
    moved(total)
