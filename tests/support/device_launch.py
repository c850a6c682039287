"""Launches test kernels on a GPU, with the launch code of the backend."""

import os
import time
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from numba_atomflow.device.driver import call
from numba_atomflow.device.resources import DeviceResources
from numba_atomflow.memory.view import View
from numba_atomflow.ops.cuda.runtime.build import assemble, assemble_arch_specific, build, make_ptx
from numba_atomflow.ops.cuda.runtime.chip import Chip, chip_of
from numba_atomflow.ops.cuda.runtime.launch import Kernel, Launch
from numba_atomflow.ops.cuda.runtime.spec import KernelSpec, Planned, element_types

LONGEST_LAUNCH = 20.0  # seconds

_loaded: dict[tuple[Any, ...], tuple[Any, Kernel]] = {}  # with numba's kernel, whose identity is part of the key
_planned: dict[KernelSpec, Kernel] = {}


@cache
def _device() -> tuple[DeviceResources, tuple[int, int], Any]:
    owner = DeviceResources()
    capability = owner.open().capability
    with owner.current():
        return owner, capability, owner.resources.stream()


def capability() -> tuple[int, int]:
    """The GPU's compute capability."""
    return _device()[1]


@cache
def chip() -> Chip:
    """The GPU in numbers."""
    owner, _, _ = _device()
    return chip_of(owner.open())


def launch_on_device(kernel: Any, ctas: int, threads: int, shared_bytes: int, arguments: tuple[Any, ...]) -> None:
    """Copy arrays to the device, run the kernel once, and copy them back. Numbers are passed as int64.

    Args:
        arguments: a value of the NamedTuple class that is the kernel's signature.
    """
    owner, capability, _ = _device()
    signature = type(arguments)
    key = (id(kernel), signature, threads, shared_bytes)
    if key not in _loaded:
        spec = KernelSpec("tested", "", (), signature, threads, shared_bytes)
        ptx = make_ptx(kernel, spec, capability)
        if "wgmma" in ptx:
            spec = replace(spec, arch_specific=True)
            code, _ = assemble_arch_specific(kernel, spec, capability)
        else:
            code, _ = assemble(ptx, capability)
        with owner.current():
            _loaded[key] = kernel, Kernel(spec, code, owner.resources)
    _run(_loaded[key][1], ctas, arguments)


def launch_planned(planned: Planned, arguments: tuple[Any, ...], ctas: int = 0) -> None:
    """The same for a kernel of the product, whose machine code comes from the compile cache if it is there.

    Args:
        ctas: grid size, where the plan leaves it open.
    """
    owner, capability, _ = _device()
    if planned.spec not in _planned:
        code = build([planned.spec], capability)[planned.spec]
        with owner.current():
            _planned[planned.spec] = Kernel(planned.spec, code, owner.resources)
    _run(_planned[planned.spec], ctas or planned.ctas, arguments)


def _run(kernel: Kernel, ctas: int, arguments: tuple[Any, ...]) -> None:
    owner, _, stream = _device()
    signature = type(arguments)
    types = tuple(f"{a.dtype.name}*" if isinstance(a, np.ndarray) else "int64" for a in arguments)
    assert types == element_types(signature), "the class declares other types"
    with owner.current(), owner.resources.scope(stream) as made:
        arrays = [a for a in arguments if isinstance(a, np.ndarray)]
        addresses = [int(made.call("cuMemAlloc", max(a.nbytes, 1), undo="cuMemFree")) for a in arrays]
        for address, array in zip(addresses, arrays, strict=True):
            call("cuMemcpyHtoD", address, array.ctypes.data, array.nbytes)
        rest = iter(addresses)
        values = [View("x", next(rest), a.shape, a.dtype.name) if isinstance(a, np.ndarray) else a for a in arguments]
        Launch(kernel, ctas, signature(*values), stream).run()
        _wait(stream)
        for address, array in zip(addresses, arrays, strict=True):
            call("cuMemcpyDtoH", array.ctypes.data, address, array.nbytes)


def _wait(stream: Any) -> None:
    """Wait for a launch. One that hangs cannot be ended: then the process is, and pytest shows where it was."""
    from cuda.bindings import driver

    deadline = time.monotonic() + LONGEST_LAUNCH
    while driver.cuStreamQuery(stream)[0] == driver.CUresult.CUDA_ERROR_NOT_READY:
        if time.monotonic() > deadline:
            os.abort()
    call("cuStreamSynchronize", stream)  # an error is raised here
