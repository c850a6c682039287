"""Writes to device memory that the host does not wait for."""

import numpy as np
import pytest
from pretended_gpu import PretendedDriver

pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")

from numba_atomflow.device.resources import DeviceResources
from numba_atomflow.memory.device import DeviceMemory, StagedWrites
from numba_atomflow.memory.view import View


def test_a_write_waits_only_for_room(pretended: PretendedDriver) -> None:
    with DeviceResources() as owner:
        owner.open()
        with owner.current():
            stream = owner.resources.stream()
            address = int(owner.resources.call("cuMemAlloc", 64, undo="cuMemFree"))
            numbers, tokens = View("numbers", address, (4,), "int64"), View("tokens", address + 32, (8,), "int32")
            staged, memory = StagedWrites(48, stream, owner.resources), DeviceMemory(stream)
            memory.write(numbers, np.full(4, 9))
            memory.write(tokens, np.full(8, 9))
            pretended.calls.clear()
            staged.write(numbers, [1, 2, 3])
            staged.write(tokens, np.array([4, 5, 6]))
            assert pretended.calls == ["cuMemcpyHtoDAsync"] * 2
            staged.write(tokens, [7])
            assert pretended.calls[2:] == ["cuStreamSynchronize", "cuMemcpyHtoDAsync"]
            assert memory.read(numbers).tolist() == [1, 2, 3, 9]
            assert memory.read(tokens).tolist() == [7, 5, 6, 9, 9, 9, 9, 9]


def test_a_write_that_is_larger_than_the_memory_is_made_in_pieces(pretended: PretendedDriver) -> None:
    with DeviceResources() as owner:
        owner.open()
        with owner.current():
            stream = owner.resources.stream()
            address = int(owner.resources.call("cuMemAlloc", 96, undo="cuMemFree"))
            view = View("words", address, (24,), "uint32")
            staged, memory = StagedWrites(48, stream, owner.resources), DeviceMemory(stream)
            memory.write(view, np.full(24, 9))
            pretended.calls.clear()
            staged.write(view, np.arange(23, dtype=np.uint32))
            assert pretended.calls == ["cuMemcpyHtoDAsync", "cuStreamSynchronize", "cuMemcpyHtoDAsync"]
            assert memory.read(view).tolist() == [*range(23), 9]
