"""Views of tiled activations in device memory: observers read and write rows, kernels get the whole matrix."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pretended_gpu import PretendedDriver

pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
pytest.importorskip("numba_cuda", reason="tiled activations are the CUDA backend's; there is none for macOS")

from numba_atomflow.device.resources import DeviceResources
from numba_atomflow.memory.device import DeviceMemory, copy_to_device
from numba_atomflow.memory.view import View
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles


@pytest.fixture
def tiled(pretended: PretendedDriver, rng: np.random.Generator) -> Iterator[tuple[DeviceMemory, View, NDArray[Any]]]:
    """A matrix [16, 72] in tiled order in device memory, its first 5 rows as a view, and its contents."""
    assert pretended.gpus == 1
    tiles = ActivationTiles(72, 16)
    values = rng.standard_normal((16, 72)).astype(np.float16)
    with DeviceResources() as owner:
        owner.open()
        with owner.current():
            address = int(owner.resources.call("cuMemAlloc", tiles.words * 4, undo="cuMemFree"))
            stream = owner.resources.stream()
            copy_to_device(address, tiles.pack(values), stream)
            view = View("x", address, (16, 72), "float16", tiling=tiles)
            yield DeviceMemory(stream), view, values


def test_a_tiled_view_reads_as_rows(tiled: tuple[DeviceMemory, View, NDArray[Any]]) -> None:
    memory, view, values = tiled
    np.testing.assert_array_equal(memory.read(view), values)
    np.testing.assert_array_equal(memory.read(view.rows(0, 5).columns(0, 30)), values[:5, :30])
    assert view.rows(0, 5).extent == view.extent == 2 * 16 * 128  # kernels get the whole matrix


def test_a_tiled_view_is_written_as_rows(tiled: tuple[DeviceMemory, View, NDArray[Any]]) -> None:
    memory, view, values = tiled
    values[:5] = np.arange(72)
    memory.write(view.rows(0, 5), np.broadcast_to(np.arange(72.0), (5, 72)))
    np.testing.assert_array_equal(memory.read(view), values)


def test_a_part_of_a_tiled_view_begins_at_its_first_element(tiled: tuple[DeviceMemory, View, NDArray[Any]]) -> None:
    _, view, _ = tiled
    with pytest.raises(IndexError, match="is tiled: a part of it begins at 0, not at 1"):
        view.rows(1, 5)
    with pytest.raises(IndexError, match="is tiled: a part of it begins at 0, not at 8"):
        view.columns(8, 72)
    with pytest.raises(ValueError, match="is tiled"):
        view.host_array()
