# ruff: noqa: N802  the functions are called as the driver calls them
"""A pretended CUDA driver: it tracks every resource and its context, and reports wrong use.

Device memory is host memory, checked copy by copy; kernels do nothing. `install` replaces the bindings. Every call can
be made to fail, before it has had its effect or after.
"""

import ctypes
import threading
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from itertools import count
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from numba_atomflow.device import driver


class Status(IntEnum):
    """As the bindings name them."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE = 720
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901
    CUDA_ERROR_UNKNOWN = 999


class Misuse(BaseException):
    """What a real driver might have answered by a crash."""


class Names:
    """An enumeration with every name."""

    def __getattr__(self, name: str) -> str:
        return name


class PretendedDriver:
    """The bindings of a machine with one GPU, by default an H200's size of one.

    Attributes:
        gpus: how many there are. peer_access: 1: kernels of each may access the others' memory.
        other_names: of GPUs that are not like the others.
        calls: names of all calls so far.
        failing: the status that a function returns instead of doing anything.
        before, after: called with the number (from 0 on) and the name of a call; what they raise, the call raises. A
            status that `before` returns is the call's, which then does nothing.
        live: handles of what exists, each with its kind ("memory", "pinned", "module" ...) and its context.
        misuses: what went wrong without an error.
    """

    CUDA_VERSION = 13000
    CUdevice_attribute = CUctx_flags = Names()

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        self.capability = capability
        self.gpus, self.peer_access, self.other_names = 1, 1, dict[int, bytes]()
        self.memory_bytes, self.free_bytes = 1 << 37, 1 << 36
        self.calls: list[str] = []
        self.failing: dict[str, Status]
        self.before: Callable[[int, str], Status | None]
        self.after: Callable[[int, str], None]
        self.behave()
        self.cleared: list[tuple[int, int]] = []
        self.launched: list[Any] = []  # configurations
        self.live: dict[int, tuple[str, int]] = {}
        self.misuses: list[str] = []
        self._handles = count(0x1000)
        self._blocks: dict[int, NDArray[np.uint8]] = {}
        self._current = threading.local()
        self._capturing: set[int] = set()
        self._busy: dict[int, set[int]] = {}  # streams, each with itself and the modules and graphs that it works with

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "PretendedDriver":
        """Be the driver of this process."""
        monkeypatch.setattr(driver, "_bindings", lambda: self)
        monkeypatch.setattr(driver, "_open_devices", {})
        monkeypatch.setattr(driver, "_initialised_in", None)
        return self

    def counts(self) -> Counter[str]:
        """How many there are of each kind."""
        return Counter(kind for kind, _ in self.live.values())

    def behave(self) -> None:
        """No call fails from here on."""
        self.failing = {}
        self.before, self.after = lambda _number, _name: None, lambda _number, _name: None

    def assert_used_well(self) -> None:
        """Nothing was used, or freed, after it was freed."""
        assert self.misuses == []
        assert self.stack() == [], "a context was left current"

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        action = getattr(type(self), f"_{name}", None)

        def function(*arguments: Any) -> tuple[Any, ...]:
            number = len(self.calls)
            self.calls.append(name)
            status = self.before(number, name) or self.failing.get(name)
            if status:
                return (status,)
            result = action(self, *arguments) if action else None
            self.after(number, name)
            if result is None:
                return (Status.CUDA_SUCCESS,)
            if isinstance(result, Status):
                return (result,)
            return (Status.CUDA_SUCCESS, *(result if isinstance(result, tuple) else (result,)))

        return function

    # --- what is alive ---

    def _misuse(self, what: str) -> None:
        self.misuses.append(f"{self.calls[-1]}: {what}")
        raise Misuse(self.misuses[-1])

    def stack(self) -> list[int]:
        """Contexts that are current on this thread, the last one on top."""
        if not hasattr(self._current, "stack"):
            self._current.stack = []
        stack: list[int] = self._current.stack
        return stack

    def _context(self) -> int:
        if not self.stack():
            self._misuse("no context is current")
        context = self.stack()[-1]
        self._alive(context, "context")
        return context

    def _make(self, kind: str, handle: int | None = None) -> int:
        handle = next(self._handles) if handle is None else handle
        self.live[handle] = kind, self._context() if kind != "context" else handle
        return handle

    def _alive(self, handle: Any, kind: str) -> int:
        found = self.live.get(int(handle))
        if found is None or found[0] != kind:
            self._misuse(f"{handle} is no {kind} that exists")
        return int(handle)

    def _destroy(self, handle: Any, kind: str) -> None:
        self._context()
        if any(int(handle) in used for used in self._busy.values()):
            self._misuse(f"the {kind} is freed while the GPU works with it")
        del self.live[self._alive(handle, kind)]
        self._blocks.pop(int(handle), None)

    def _inside(self, address: Any, nbytes: int) -> int:
        for start, block in self._blocks.items():
            if start <= int(address) and int(address) + nbytes <= start + len(block):
                self._context()
                return int(address)
        self._misuse(f"{nbytes} bytes at {address} are not allocated")
        return 0

    # --- the device and its context ---

    def _cuDeviceGetCount(self) -> int:
        return self.gpus

    def _cuDeviceGet(self, ordinal: int) -> int:
        return ordinal

    def _cuDeviceGetAttribute(self, attribute: str, _device: int) -> int:
        values = {
            "COMPUTE_CAPABILITY_MAJOR": self.capability[0],
            "COMPUTE_CAPABILITY_MINOR": self.capability[1],
            "MULTIPROCESSOR_COUNT": 132,
            "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 232448,
            "L2_CACHE_SIZE": 60 << 20,
        }
        return values[attribute.removeprefix("CU_DEVICE_ATTRIBUTE_")]

    def _cuDeviceGetName(self, _length: int, device: int) -> bytes:
        return self.other_names.get(device, b"Pretended GPU\0")

    def _cuDeviceCanAccessPeer(self, _device: int, _peer: int) -> int:
        return self.peer_access

    def _cuCtxEnablePeerAccess(self, peer: int, _flags: int) -> None:
        if self._alive(peer, "context") == self._context():
            self._misuse("a context is no peer of itself")

    def _cuDeviceTotalMem(self, _device: int) -> int:
        return self.memory_bytes

    def _cuDriverGetVersion(self) -> int:
        return 13000

    def _cuGetErrorString(self, _status: Status) -> bytes:
        return b"it went wrong"

    def _cuCtxCreate(self, _parameters: Any, _flags: Any, _device: int) -> int:
        self.stack().append(self._make("context"))
        return self.stack()[-1]

    def _cuCtxDestroy(self, context: int) -> None:
        self._alive(context, "context")
        self._busy.clear()
        for handle in [handle for handle, (_, owner) in self.live.items() if owner == context]:
            del self.live[handle]
            self._blocks.pop(handle, None)
        if self.stack()[-1:] == [context]:
            self.stack().pop()

    def _cuCtxPushCurrent(self, context: int) -> None:
        self.stack().append(self._alive(context, "context"))

    def _cuCtxPopCurrent(self) -> int:
        if not self.stack():
            self._misuse("no context is current")
        return self.stack().pop()

    def _cuCtxGetCurrent(self) -> int:
        return self.stack()[-1] if self.stack() else 0

    # --- memory ---

    def _cuMemGetInfo(self) -> tuple[int, int]:
        self._context()
        held = sum(len(self._blocks[handle]) for handle, (kind, _) in self.live.items() if kind == "memory")
        return self.free_bytes - held, self.memory_bytes

    def _cuMemAlloc(self, nbytes: int) -> int:
        return self._block("memory", nbytes)

    def _cuMemHostAlloc(self, nbytes: int, _flags: Any) -> int:
        return self._block("pinned", nbytes)

    def _block(self, kind: str, nbytes: int) -> int:
        block = np.zeros(nbytes, np.uint8)  # the system clears what is used, when it is
        address = self._make(kind, block.ctypes.data)
        self._blocks[address] = block
        return address

    def _cuMemHostGetDevicePointer(self, pointer: int, _flags: int) -> int:
        return self._alive(pointer, "pinned")

    def _cuMemFree(self, address: int) -> None:
        self._destroy(address, "memory")

    def _cuMemFreeHost(self, pointer: int) -> None:
        self._destroy(pointer, "pinned")

    def _cuMemcpyHtoDAsync(self, address: int, source: int, nbytes: int, stream: int) -> None:
        self._alive(stream, "stream")
        ctypes.memmove(self._inside(address, nbytes), source, nbytes)

    def _cuMemcpyDtoH(self, target: int, address: int, nbytes: int) -> None:
        ctypes.memmove(target, self._inside(address, nbytes), nbytes)

    def _cuMemcpyDtoHAsync(self, target: int, address: int, nbytes: int, stream: int) -> None:
        self._alive(stream, "stream")
        self._cuMemcpyDtoH(target, address, nbytes)

    def _cuMemcpyDtoDAsync(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._alive(stream, "stream")
        ctypes.memmove(self._inside(target, nbytes), self._inside(source, nbytes), nbytes)

    def _cuMemsetD8Async(self, address: int, value: int, nbytes: int, _stream: int) -> None:
        self.cleared.append((address, nbytes))
        ctypes.memset(self._inside(address, nbytes), value, nbytes)

    def _cuMemsetD32Async(self, address: int, value: int, count: int, stream: int) -> None:
        self._alive(stream, "stream")
        self._inside(address, 4 * count)
        words = (ctypes.c_uint32 * count).from_address(int(address))
        np.frombuffer(words, np.uint32)[:] = value

    # --- streams, graphs, kernels ---

    def _cuStreamCreate(self, _flags: Any) -> int:
        return self._make("stream")

    def _cuStreamDestroy(self, stream: int) -> None:
        self._destroy(stream, "stream")

    def _cuStreamSynchronize(self, stream: int) -> None:
        self._busy.pop(self._alive(stream, "stream"), None)

    def _cuStreamBeginCapture(self, stream: int, _mode: Any) -> None:
        if stream in self._capturing:
            self._misuse("the stream is being captured already")
        self._capturing.add(self._alive(stream, "stream"))

    def _cuStreamEndCapture(self, stream: int) -> int | Status:
        if self._alive(stream, "stream") not in self._capturing:
            return Status.CUDA_ERROR_UNKNOWN
        self._capturing.remove(stream)
        return self._make("graph")

    def _cuGraphDestroy(self, graph: int) -> None:
        self._destroy(graph, "graph")

    def _cuGraphInstantiate(self, graph: int, _flags: int) -> int:
        self._alive(graph, "graph")
        return self._make("executable graph")

    def _cuGraphExecDestroy(self, executable: int) -> None:
        self._destroy(executable, "executable graph")

    def _cuGraphUpload(self, executable: int, stream: int) -> None:
        self._alive(executable, "executable graph")
        self._alive(stream, "stream")

    def _cuGraphLaunch(self, executable: int, stream: int) -> None:
        self._cuGraphUpload(executable, stream)
        self._work(stream, executable)

    def _cuModuleLoadData(self, _code: bytes) -> int:
        return self._make("module")

    def _cuModuleUnload(self, module: int) -> None:
        self._destroy(module, "module")

    def _cuModuleGetFunction(self, module: int, _name: bytes) -> int:
        return self._alive(module, "module")

    def _cuFuncSetAttribute(self, function: int, _attribute: Any, _value: int) -> None:
        self._alive(function, "module")

    def _cuLaunchKernelEx(self, config: Any, function: int, _arguments: int, _extra: int) -> None:
        self._alive(function, "module")
        self.launched.append(config)
        stream = int(config.hStream)
        if stream and self._alive(stream, "stream") not in self._capturing:
            self._work(stream, function)

    def _work(self, stream: int, with_what: int) -> None:
        self._busy.setdefault(stream, {stream}).add(with_what)

    def _cuEventCreate(self, _flags: int) -> int:
        return self._make("event")

    def _cuEventDestroy(self, event: int) -> None:
        self._destroy(event, "event")

    def _cuEventElapsedTime(self, _start: int, _end: int) -> float:
        return 1.0


def pretend_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels "compile" at once, to code that the pretended driver does not look at."""

    def build(specs: Any, _capability: Any, progress: Any = None) -> dict[Any, bytes]:
        if progress:
            progress("compiling GPU kernels", 0, len(specs))
        return dict.fromkeys(specs, b"code")

    for user in ("ops.cuda.runtime.loaded", "backends.cuda.measure"):
        monkeypatch.setattr(f"numba_atomflow.{user}.build", build)
    monkeypatch.setattr("numba_atomflow.ops.cuda.runtime.build.missing_compiler", lambda: None)
    monkeypatch.setattr("numba_atomflow.ops.cuda.runtime.launch.entry_name", lambda _code: "kernel")
