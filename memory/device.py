"""Device memory: the arena of an engine on a GPU, and copies to and from it.

All calls use the current context of the calling thread.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.device.driver import DriverError, call
from numba_atomflow.device.resources import Resources
from numba_atomflow.errors import BackendError
from numba_atomflow.memory.plan import MemoryPlan
from numba_atomflow.memory.view import Tiling, View

_HEADROOM = 64 << 20  # bytes for the driver: code and launches
_STAGED_ALIGNMENT = 16  # bytes: that of any element


class DeviceArena:
    """One `cuMemAlloc` with every buffer of a plan; `resources` owns it.

    Raises:
        BackendError: the GPU has too little free memory.
    """

    def __init__(self, plan: MemoryPlan, resources: Resources) -> None:
        self.plan = plan
        free, total = (int(count) for count in call("cuMemGetInfo"))
        pools = plan.pool_bytes()
        needed = ", ".join(f"{pool} {size / 1e9:.2f}" for pool, size in pools.items())
        shorter = (
            "use a smaller --max-seq-len or --prefill-chunk, or " if pools["weights"] + _HEADROOM < free else "use "
        )
        refusal = (
            f"The model needs {plan.total / 1e9:.2f} GB on the GPU ({needed}), but only {free / 1e9:.2f} of its "
            f"{total / 1e9:.2f} GB are free; {shorter}--backend cpu."
        )
        if plan.total + _HEADROOM > free:
            raise BackendError(refusal)
        try:
            self.base = int(resources.call("cuMemAlloc", plan.total, undo="cuMemFree"))
        except DriverError as error:
            if error.code == "CUDA_ERROR_OUT_OF_MEMORY":  # another process allocated first
                raise BackendError(refusal) from error
            raise
        self._views = {
            buffer.name: View(buffer.name, self.base + offset, buffer.shape, buffer.dtype)
            for buffer, offset in zip(plan.buffers, plan.offsets, strict=True)
        }

    def __getitem__(self, name: str) -> View:
        return self._views[name]

    def space_after(self, pool: str) -> tuple[int, int]:
        """Address and bytes of everything after a pool."""
        ends = [
            offset + buffer.nbytes
            for buffer, offset in zip(self.plan.buffers, self.plan.offsets, strict=True)
            if buffer.pool == pool
        ]
        start = -(-max(ends, default=0) // 128) * 128
        return self.base + start, self.plan.total - start

    def clear(self, pools: Collection[str], stream: Any) -> None:
        """Fill every buffer of these pools with zeros, in stream order."""
        for buffer in self.plan.buffers:
            if buffer.pool in pools:
                view = self[buffer.name]
                call("cuMemsetD8Async", view.address, 0, view.nbytes, stream)


def copy_to_device(address: int, values: NDArray[Any], stream: Any) -> None:
    """Copy a C-contiguous host array to a device address, in stream order.

    Pageable memory may be reused when this returns; pinned memory must not change until the copy has completed.
    """
    if values.nbytes:
        call("cuMemcpyHtoDAsync", address, values.ctypes.data, values.nbytes, stream)


class DeviceMemory:
    """Access of observers to device memory, by synchronous copies."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, view: View) -> NDArray[Any]:
        """Copy the view to the host."""
        if view.tiling is not None:
            rows = view.tiling.unpack(self._fetch(view).view(np.uint32))
            return rows[: view.shape[0], : view.shape[1]].copy()
        return self._strided(view, self._fetch(view)).copy()

    def write(self, view: View, values: NDArray[Any]) -> None:
        """Copy `values` to the view; memory between its rows is unchanged."""
        if view.readonly:
            raise ValueError(f"{view.name} is read-only")
        if view.tiling is not None:
            self._write_tiled(view, view.tiling, values)
            return
        raw = self._fetch(view) if view.pitch else np.empty(view.extent, np.uint8)
        self._strided(view, raw)[:] = values
        copy_to_device(view.address, raw, self._stream)
        call("cuStreamSynchronize", self._stream)

    def _write_tiled(self, view: View, tiling: Tiling, values: NDArray[Any]) -> None:
        rows = tiling.unpack(self._fetch(view).view(np.uint32))
        rows[: view.shape[0], : view.shape[1]] = values
        copy_to_device(view.address, tiling.pack(rows), self._stream)
        call("cuStreamSynchronize", self._stream)

    def _fetch(self, view: View) -> NDArray[np.uint8]:
        raw = np.empty(view.extent, np.uint8)
        call("cuStreamSynchronize", self._stream)
        if raw.nbytes:
            call("cuMemcpyDtoH", raw.ctypes.data, view.address, raw.nbytes)
        return raw

    @staticmethod
    def _strided(view: View, raw: NDArray[np.uint8]) -> NDArray[Any]:
        array: NDArray[Any] = np.ndarray(view.shape, view.dtype, raw.data, strides=view.strides)
        return array


class PinnedArray:
    """Pinned host memory, mapped to the device: an array of zeros, and a view with its device address. `resources` owns
    it; the array is invalid after `resources` is closed.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, resources: Resources) -> None:
        from cuda.bindings import driver

        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        pointer = int(resources.call("cuMemHostAlloc", nbytes, driver.CU_MEMHOSTALLOC_DEVICEMAP, undo="cuMemFreeHost"))
        address = int(call("cuMemHostGetDevicePointer", pointer, 0))
        self.view = View("pinned", address, shape, dtype)
        self.array = View("pinned", pointer, shape, dtype).host_array()
        self.array[:] = 0


class StagedWrites:
    """Writes to device memory, in stream order, that the host does not wait for. Values are copied from pinned memory,
    which `resources` owns; only when it is full, a write waits for those before it.

    Args:
        nbytes: of that memory; what is larger is written in pieces.
    """

    def __init__(self, nbytes: int, stream: Any, resources: Resources) -> None:
        self._stream = stream
        self._memory = PinnedArray((nbytes,), "uint8", resources).array
        self._address, self._used = int(self._memory.ctypes.data), 0

    def write(self, view: View, values: Sequence[float] | NDArray[Any]) -> None:
        """Copy values to the first elements of a view, which is contiguous."""
        itemsize = np.dtype(view.dtype).itemsize
        most = len(self._memory) // itemsize
        for start in range(0, len(values), most):
            self._write_piece(view.address + start * itemsize, view.dtype, values[start : start + most])

    def _write_piece(self, address: int, dtype: str, values: Sequence[float] | NDArray[Any]) -> None:
        nbytes = len(values) * np.dtype(dtype).itemsize
        if self._used + nbytes > len(self._memory):
            call("cuStreamSynchronize", self._stream)  # every copy is done then
            self._used = 0
        self._memory[self._used : self._used + nbytes].view(dtype)[:] = values
        call("cuMemcpyHtoDAsync", address, self._address + self._used, nbytes, self._stream)
        self._used += -(-nbytes // _STAGED_ALIGNMENT) * _STAGED_ALIGNMENT
