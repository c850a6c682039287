"""Weights from the mapped file to the device, and there into fragment order.

Each projection goes in pieces straight from the mapping into the memory behind the weights, which the KV cache and the
activations will use later, and is repacked from there: no copy of the weights on the host, none on the device.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.device.driver import call
from numba_atomflow.ops.cuda.layout.weights import TILE_ROWS, FragmentLayout, repack_blocks, repack_sizes
from numba_atomflow.ops.cuda.runtime.launch import DeviceArray, Kernel, Launch
from numba_atomflow.utils.progress import Progress

ALIGNMENT = 128  # bytes, of what is staged
_LARGEST_PIECE = 64 << 20  # bytes: the progress bar moves


@dataclass(frozen=True)
class Piece:
    """A part of a projection that is repacked at once.

    Attributes:
        rows: ranges of the checkpoint's rows, which stand one behind the other when repacked.
        layout: of the piece alone.
        first_tile: where its tiles begin among the projection's.
    """

    rows: tuple[slice, ...]
    layout: FragmentLayout
    first_tile: int


def pieces(layout: FragmentLayout, room: int) -> Iterator[Piece]:
    """Cut a projection into pieces whose codes and scales take at most `room` bytes.

    Raises:
        ValueError: not even the smallest piece fits.
    """
    row_bytes = 2 * layout.columns if layout.halves else layout.columns + 4 * layout.groups
    fitting = (min(room, _LARGEST_PIECE) - ALIGNMENT) // row_bytes  # rows; scales begin at a multiple of it
    section = 2 * layout.half
    if not layout.half:
        step = fitting // TILE_ROWS * TILE_ROWS
        for first in range(0, layout.rows, _positive(step)):
            last = min(first + step, layout.rows)
            yield Piece((slice(first, last),), replace(layout, rows=last - first), first // TILE_ROWS)
    elif fitting >= section:
        step = fitting // section * section
        for first in range(0, layout.rows, step):
            last = min(first + step, layout.rows)
            tile = first // section * layout.section_tiles
            yield Piece((slice(first, last),), replace(layout, rows=last - first), tile)
    else:
        step = fitting // TILE_ROWS * 8  # pairs of rows
        for base in range(0, layout.rows, section):
            for first in range(0, layout.half, _positive(step)):
                last = min(first + step, layout.half)
                ranges = tuple(slice(base + at + first, base + at + last) for at in (0, layout.half))
                tile = base // section * layout.section_tiles + first // 8
                yield Piece(ranges, replace(layout, rows=2 * (last - first), half=last - first), tile)


def _positive(step: int) -> int:
    if step <= 0:
        raise ValueError("the staging memory holds not even one tile of a projection")
    return step


@dataclass(frozen=True)
class _Span:
    """Bytes of device memory, as a kernel's argument."""

    address: int
    extent: int


class Uploader:
    """Copies and repacks through one staging area.

    Args:
        loaded: kernels by name. staging: first byte and size of the area. stream: that everything runs in.
    """

    def __init__(self, loaded: Mapping[str, Kernel], staging: tuple[int, int], stream: Any) -> None:
        self._loaded, self._staging, self._stream = loaded, staging, stream

    def projection(
        self,
        layout: FragmentLayout,
        parts: Sequence[NDArray[Any]],
        words: DeviceArray,
        progress: Callable[[int], None],
    ) -> None:
        """Bring a projection [N, K] to `words`.

        Args:
            parts: codes uint8 [N, K] and scales float32 [N, groups]; or float16 [N, K] alone.
            progress: told the bytes of each piece.
        """
        kernel = self._loaded["repack_halves" if layout.halves else "repack"]
        address, room = self._staging
        for piece in pieces(layout, room):
            staged, at = [], address
            for array in parts:
                staged.append(_Span(at, piece.layout.rows * array.shape[1] * array.itemsize))
                for rows in piece.rows:
                    self._copy(at, array[rows])
                    at += array[rows].nbytes
                at = -(-at // ALIGNMENT) * ALIGNMENT
            target = _Span(words.address + 4 * piece.first_tile * layout.tile_words, 4 * piece.layout.words)
            arguments: list[DeviceArray | int] = [*staged, target, *repack_sizes(piece.layout)]
            Launch(kernel, repack_blocks(piece.layout), arguments, self._stream).run()
            progress(sum(span.extent for span in staged))

    def vector(self, values: NDArray[np.float32], target: DeviceArray) -> None:
        """Bring a norm's weights or a bias to the device."""
        self._copy(target.address, values)

    def _copy(self, address: int, values: NDArray[Any]) -> None:
        """From pageable memory, which the driver has taken when this returns."""
        if values.nbytes:
            call("cuMemcpyHtoDAsync", address, values.ctypes.data, values.nbytes, self._stream)


def upload(
    uploader: Uploader,
    arrays: Mapping[str, NDArray[Any]],
    targets: Mapping[str, DeviceArray],
    layout_of: Callable[[str], FragmentLayout],
    progress: Progress | None,
) -> None:
    """Bring all weights to the device.

    Args:
        arrays: the checkpoint's, by name. targets: places on the device by the checkpoint's parts.
        progress: called with what is being done, MB done and MB in all.
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
        stored = [arrays[name] for name in (f"{part}.weight", f"{part}.scale") if name in arrays]
        uploader.projection(layout_of(part), stored, target, moved)
    moved(total)
