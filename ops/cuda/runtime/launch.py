"""Machine code on the GPU, and launches whose arguments stay in place: what a graph is captured from.

numba passes an array as seven words: two pointers to its owner (unused here), number of elements, bytes of one,
address, number of elements, stride. A launch packs them once; running it again costs one call of the driver.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from numba_atomflow.device.driver import call
from numba_atomflow.device.resources import Resources
from numba_atomflow.ops.cuda.runtime.spec import KernelSpec

_PLAIN_SHARED_BYTES = 48 * 1024  # a block may have more only if its function says so


class DeviceArray(Protocol):
    """What a kernel needs to know of an array: a view of `memory` has it."""

    @property
    def address(self) -> int: ...
    @property
    def extent(self) -> int: ...


class Kernel:
    """A kernel's machine code, loaded into the current context; `made` owns it."""

    def __init__(self, spec: KernelSpec, code: bytes, made: Resources) -> None:
        self.spec = spec
        module = made.call("cuModuleLoadData", code, undo="cuModuleUnload")
        self.function = call("cuModuleGetFunction", module, spec.name.encode())
        if spec.shared_bytes > _PLAIN_SHARED_BYTES:
            from cuda.bindings import driver

            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            call("cuFuncSetAttribute", self.function, attribute, spec.shared_bytes)


class Launch:
    """A kernel with its arguments, ready to be put into a stream as often as one likes.

    Args:
        blocks: of the grid.
        arguments: arrays of device memory, and numbers: a value of the NamedTuple class that is the kernel's signature,
            or, where that is a tuple of types, as many values in its order.

    Raises:
        TypeError: they are no value of the signature's class, or a number where the kernel takes an array.
        stream: that `run` uses.
    """

    def __init__(self, kernel: Kernel, blocks: int, arguments: Sequence[DeviceArray | int], stream: Any) -> None:
        from cuda.bindings import driver

        spec = kernel.spec
        self.kernel = kernel
        self.blocks = blocks
        if isinstance(spec.signature, type) and not isinstance(arguments, spec.signature):
            raise TypeError(f"{spec.name} takes a {spec.signature.__name__}, not a {type(arguments).__name__}")
        words = [word for kind, value in zip(spec.element_types, arguments, strict=True) for word in _pack(kind, value)]
        self._words = (ctypes.c_int64 * len(words))(*words)
        start = ctypes.addressof(self._words)
        self._pointers = (ctypes.c_void_p * len(words))(*range(start, start + 8 * len(words), 8))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = spec.threads, 1, 1
        config.sharedMemBytes = spec.shared_bytes
        config.hStream = stream
        attributes = _attributes(spec)
        config.attrs, config.numAttrs = attributes, len(attributes)
        self._config = config

    def run(self) -> None:
        """Put it into its stream.

        Raises:
            DriverError: it cannot be launched; CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE if it is cooperative and the
                GPU cannot hold all of its blocks at once.
        """
        call("cuLaunchKernelEx", self._config, self.kernel.function, ctypes.addressof(self._pointers), 0)


def _attributes(spec: KernelSpec) -> list[Any]:
    """The driver's attributes of a launch."""
    from cuda.bindings import driver

    attributes, kinds = [], driver.CUlaunchAttributeID
    if spec.dependent:
        attribute = driver.CUlaunchAttribute()
        attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    if spec.cooperative:
        attribute = driver.CUlaunchAttribute()
        attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        attribute.value.cooperative = 1
        attributes.append(attribute)
    return attributes


def _pack(kind: str, value: DeviceArray | int) -> tuple[int, ...]:
    if isinstance(value, int):
        if kind.endswith("*"):
            raise TypeError(f"a number where the kernel takes {kind}")
        return (value,)
    size = np.dtype(kind.removesuffix("*")).itemsize
    count = value.extent // size
    return (0, 0, count, size, value.address, count, size)
