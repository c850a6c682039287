"""The CUDA driver: every call is checked, and a failure is an error with one sentence.

A process has at most one context per GPU, created for its first user and destroyed with its last. It is not the primary
context that numba and PyTorch share, so closing the last engine frees everything. A context belongs to the process that
created it: CUDA does not work in a forked child. After a kernel has failed (an illegal address, say) CUDA refuses every
call of the process, new contexts included (measured with driver 580); the process can go on with the CPU backend.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from numba_atomflow.errors import BackendError
from numba_atomflow.utils.interrupts import deferred_interrupts

OLDEST = (8, 0)  # compute capability: the first with `mma.m16n8k16` on float16 and with `cp.async`
_INSTALL = "pip install 'numba-atomflow[cu13]' (or [cu12] for an older driver)"

# Sticky errors: every later call of the process fails. Source: the driver's documentation of CUresult.
_FINAL = {
    f"CUDA_ERROR_{name}"
    for name in (
        "ILLEGAL_ADDRESS",
        "LAUNCH_TIMEOUT",
        "ASSERT",
        "HARDWARE_STACK_ERROR",
        "ILLEGAL_INSTRUCTION",
        "MISALIGNED_ADDRESS",
        "INVALID_ADDRESS_SPACE",
        "INVALID_PC",
        "LAUNCH_FAILED",
        "EXTERNAL_DEVICE",
        "ECC_UNCORRECTABLE",
    )
}

_OTHER_LIBRARIES = "install the CUDA libraries that fit the driver: numba-atomflow[cu13] or [cu12]"
_ADVICE = {
    "CUDA_ERROR_OUT_OF_MEMORY": "free memory on the GPU or use a smaller --max-seq-len",
    "CUDA_ERROR_INVALID_IMAGE": _OTHER_LIBRARIES,
    "CUDA_ERROR_INVALID_PTX": _OTHER_LIBRARIES,
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": _OTHER_LIBRARIES,
    "CUDA_ERROR_NO_BINARY_FOR_GPU": _OTHER_LIBRARIES,
}

_lock = threading.RLock()  # an unclosed engine may be collected, and closed, on the thread that holds it
_initialised_in: int | None = None  # process


class DriverError(BackendError):
    """A call of the CUDA driver failed.

    Attributes:
        code: the driver's name of the error, such as CUDA_ERROR_OUT_OF_MEMORY.
    """

    def __init__(self, function: str, code: str, explanation: str) -> None:
        advice = (
            "start a new process to use the GPU again" if code in _FINAL else _ADVICE.get(code, "load the model again")
        )
        super().__init__(f"The GPU failed in {function}: {explanation} ({code}); {advice}, or use --backend cpu.")
        self.code = code

    @property
    def final(self) -> bool:
        """Whether this process cannot use the GPU any more."""
        return self.code in _FINAL


def call(function: str, *arguments: Any) -> Any:
    """Call a function of the CUDA driver API; its result, a tuple if there are several, None if there is none.

    Raises:
        DriverError: it failed.
        BackendError: the bindings or the driver are not installed.
    """
    driver = _bindings()
    try:
        status, *results = getattr(driver, function)(*arguments)
    except RuntimeError as error:
        if type(error).__name__ == "FunctionNotFoundError":
            raise BackendError(
                f"The NVIDIA driver is too old for these bindings (it has no {function}); update it, install "
                "'numba-atomflow[cu12]', or use --backend cpu."
            ) from error
        raise BackendError("This machine has no NVIDIA driver; install one, or use --backend cpu.") from error
    if status != 0:
        code, explanation = status.name, ""
        with suppress(Exception):
            explanation = driver.cuGetErrorString(status)[1].decode()
        raise DriverError(function, code, explanation)
    return results[0] if len(results) == 1 else tuple(results) or None


@cache
def _bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendError(f"The package cuda-python is missing; {_INSTALL}, or use --backend cpu.") from error
    return driver


class Device:
    """One GPU and its context. `open_device` creates it, `close` drops one user of it.

    Attributes:
        ordinal: its number among the GPUs that the driver sees (CUDA_VISIBLE_DEVICES), from 0.
        name: the product name.
        capability: compute capability, such as (9, 0).
        sms: number of SMs.
        shared_bytes: largest shared memory of a CTA.
        memory_bytes: size of device memory.
        l2_bytes: size of L2.
        driver_version: the CUDA version that the driver supports, such as (13, 0).
    """

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal
        handle = call("cuDeviceGet", ordinal)
        attributes = _bindings().CUdevice_attribute

        def attribute(name: str) -> int:
            return int(call("cuDeviceGetAttribute", getattr(attributes, f"CU_DEVICE_ATTRIBUTE_{name}"), handle))

        self.name = call("cuDeviceGetName", 100, handle).split(b"\0")[0].decode()
        self.capability = attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")
        if self.capability < OLDEST:
            raise BackendError(
                f"{self.name} has compute capability {self.capability[0]}.{self.capability[1]}, but the kernels need "
                f"{OLDEST[0]}.{OLDEST[1]}; use --backend cpu."
            )
        self.sms = attribute("MULTIPROCESSOR_COUNT")
        self.shared_bytes = attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        self.l2_bytes = attribute("L2_CACHE_SIZE")
        self.memory_bytes = int(call("cuDeviceTotalMem", handle))
        version = int(call("cuDriverGetVersion"))
        self.driver_version = version // 1000, version % 1000 // 10
        self._users: list[None] = []  # one entry each: a list grows and shrinks in one bytecode, a count does not
        self._process = os.getpid()
        self._context: Any = _create_context(handle)

    @property
    def closed(self) -> bool:
        """Whether the context is gone."""
        return self._context is None

    @contextmanager
    def current(self) -> Iterator[None]:
        """Push the context on this thread and pop it afterwards.

        After a final failure of the GPU inside, no later `open_device` returns this device.

        Raises:
            BackendError: the context is gone, or another process's.
        """
        if os.getpid() != self._process:
            raise _forked()
        if self._context is None:
            raise BackendError("The GPU was given back; load the model again.")
        completed = False
        try:
            call("cuCtxPushCurrent", self._context)
            yield
            completed = True
        except DriverError as error:
            if error.final:
                self._abandon()
            raise
        finally:
            with suppress(DriverError):
                if completed or self._is_current():  # Ctrl-C may have come before or after it was pushed
                    call("cuCtxPopCurrent")

    def _is_current(self) -> bool:
        return self._context is not None and int(call("cuCtxGetCurrent")) == int(self._context)

    def free_bytes(self) -> int:
        """Unallocated device memory."""
        with self.current():
            return int(call("cuMemGetInfo")[0])

    def enable_peer(self, other: "Device") -> None:
        """Let kernels of this GPU read and write the other one's memory, as long as both contexts exist.

        Raises:
            BackendError: they cannot.
        """
        devices = (call("cuDeviceGet", device.ordinal) for device in (self, other))
        if not int(call("cuDeviceCanAccessPeer", *devices)):
            raise BackendError(
                f"GPU {self.ordinal} cannot access the memory of GPU {other.ordinal}; choose GPUs that NVLink connects "
                "(CUDA_VISIBLE_DEVICES), or use --gpus 1."
            )
        with self.current():
            try:
                call("cuCtxEnablePeerAccess", other._context, 0)  # noqa: SLF001
            except DriverError as error:
                if error.code != "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED":  # by another engine of this process
                    raise

    def close(self) -> None:
        """Drop one user; the last one destroys the context. Does nothing in a forked child."""
        if os.getpid() != self._process:
            return
        with deferred_interrupts(), _lock:
            if self._users:
                self._users.pop()
            if self._users or self._context is None:
                return
            context, self._context = self._context, None
            _forget(self)
            with suppress(DriverError):  # after a failed kernel, destroying may report that failure once more
                call("cuCtxDestroy", context)

    def _abandon(self) -> None:
        """The next `open_device` asks the driver again, which refuses; present users still close this one."""
        with _lock:
            _forget(self)


_open_devices: dict[int, Device] = {}  # by ordinal


def open_device(device_ordinal: int = 0) -> Device:
    """A GPU of this process, with one user more. Each user closes it, normally through `resources.DeviceResources`.

    Args:
        device_ordinal: which of the GPUs that the driver sees (CUDA_VISIBLE_DEVICES), from 0.

    Raises:
        BackendError: there is no such GPU, or it cannot be used.
    """
    global _initialised_in  # noqa: PLW0603  the driver is initialised once per process
    if _initialised_in not in (None, os.getpid()):  # the lock may have been another thread's
        raise _forked()
    with deferred_interrupts(), _lock:
        while True:
            if device_ordinal not in _open_devices:
                call("cuInit", 0)
                _initialised_in = os.getpid()
                _check_ordinal(device_ordinal)
                _open_devices[device_ordinal] = Device(device_ordinal)
            device = _open_devices[device_ordinal]
            device._users.append(None)  # noqa: SLF001
            if not device.closed:  # its last user may have been collected a moment ago
                return device


def gpu_count() -> int:
    """GPUs that the driver sees (CUDA_VISIBLE_DEVICES).

    Raises:
        BackendError: there is no driver, or no bindings.
    """
    global _initialised_in  # noqa: PLW0603
    if _initialised_in not in (None, os.getpid()):
        raise _forked()
    with deferred_interrupts(), _lock:
        call("cuInit", 0)
        _initialised_in = os.getpid()
        return int(call("cuDeviceGetCount"))


def _check_ordinal(device_ordinal: int) -> None:
    gpus = int(call("cuDeviceGetCount"))
    if gpus == 0:
        raise BackendError("The NVIDIA driver sees no GPU; check CUDA_VISIBLE_DEVICES, or use --backend cpu.")
    if not 0 <= device_ordinal < gpus:
        present = "one GPU, number 0" if gpus == 1 else f"{gpus} GPUs, numbers 0 to {gpus - 1}"
        raise BackendError(
            f"There is no GPU number {device_ordinal}: the NVIDIA driver sees {present}; choose one of these, check "
            "CUDA_VISIBLE_DEVICES, or use --backend cpu."
        )


def _forget(device: Device) -> None:
    """Take a device off the list, unless a later one has its ordinal already. The lock is held."""
    if _open_devices.get(device.ordinal) is device:
        del _open_devices[device.ordinal]


def _forked() -> BackendError:
    return BackendError(
        "The GPU was used before this process was forked, and CUDA does not go on in a forked child; start processes "
        "with multiprocessing's 'spawn', or use the GPU in the children alone."
    )


def _create_context(handle: Any) -> Any:
    driver = _bindings()
    flags = driver.CUctx_flags.CU_CTX_SCHED_SPIN
    # CUDA 13 put creation parameters in front of the flags.
    if getattr(driver, "CUDA_VERSION", 0) >= 13000:
        context = call("cuCtxCreate", None, flags, handle)
    else:
        context = call("cuCtxCreate", flags, handle)
    try:
        call("cuCtxPopCurrent")  # creating it has made it current
    except BaseException:
        with suppress(DriverError):
            call("cuCtxDestroy", context)
        raise
    return context
