"""Loaded kernels, and launches with packed arguments, which a graph is captured from.

numba passes an array as seven words: two pointers to its owner (unused here), number of elements, bytes per element,
address, number of elements, stride. A launch packs them once; running it again is one call of the driver.
"""

import ctypes
from typing import Any, Protocol

import numpy as np

from numba_atomflow.device.driver import call
from numba_atomflow.device.resources import Resources
from numba_atomflow.ops.cuda.runtime.build import entry_name
from numba_atomflow.ops.cuda.runtime.spec import KernelSpec

_PLAIN_SHARED_BYTES = 48 * 1024  # a CTA may have more only if its function has the attribute


class DeviceArray(Protocol):
    """An array of device memory, such as a view of `memory`: its address and its bytes."""

    @property
    def address(self) -> int: ...
    @property
    def extent(self) -> int: ...


class Kernel:
    """A kernel's machine code, loaded into the current context; `resources` owns it."""

    def __init__(self, spec: KernelSpec, code: bytes, resources: Resources) -> None:
        self.spec = spec
        module = resources.call("cuModuleLoadData", code, undo="cuModuleUnload")
        name = entry_name(code) if spec.arch_specific else spec.name
        self.function = call("cuModuleGetFunction", module, name.encode())
        if spec.shared_bytes > _PLAIN_SHARED_BYTES:
            from cuda.bindings import driver

            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            call("cuFuncSetAttribute", self.function, attribute, spec.shared_bytes)
        if spec.whole_carveout:
            from cuda.bindings import driver

            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            call("cuFuncSetAttribute", self.function, attribute, 100)  # per cent


class Launch:
    """A kernel with packed arguments, to be launched any number of times.

    Args:
        ctas: grid size.
        arguments: arrays of device memory, and numbers: a value of the NamedTuple class that is the kernel's signature.
        stream: that `run` uses.

    Raises:
        TypeError: they are of another class, or a number where the kernel takes an array.
    """

    def __init__(self, kernel: Kernel, ctas: int, arguments: tuple[DeviceArray | int, ...], stream: Any) -> None:
        from cuda.bindings import driver

        spec = kernel.spec
        self.kernel = kernel
        self.ctas = ctas
        if not isinstance(arguments, spec.signature):
            raise TypeError(f"{spec.name} takes a {spec.signature.__name__}, not a {type(arguments).__name__}")
        words = [word for kind, value in zip(spec.element_types, arguments, strict=True) for word in _pack(kind, value)]
        self._words = (ctypes.c_int64 * len(words))(*words)
        start = ctypes.addressof(self._words)
        self._pointers = (ctypes.c_void_p * len(words))(*range(start, start + 8 * len(words), 8))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = ctas, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = spec.threads, 1, 1
        config.sharedMemBytes = spec.shared_bytes
        config.hStream = stream
        attributes = _attributes(spec)
        config.attrs, config.numAttrs = attributes, len(attributes)
        self._config = config

    def run(self) -> None:
        """Launch it in its stream.

        Raises:
            DriverError: it cannot be launched; CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE if it is cooperative and the
                GPU cannot hold all of its CTAs at once.
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
