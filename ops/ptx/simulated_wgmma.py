"""The twin of `wgmma` in numba's CUDA simulator: it multiplies when the batch is waited for, from what is there then.

Between issue and wait the accumulators hold a NaN, and everything that the hardware may read at any time (registers of
A, shared memory) is compared at the wait with what it was at the issue. So a kernel fails here if it reads or writes
accumulators too early, rewrites A or lets a copy overwrite B before the wait, or forgets a fence.
"""

import threading
from collections import deque
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.ops.ptx import simulator

_THREADS, _ROWS, _STEP_BYTES = 128, 64, 32
_IN_FLIGHT = np.uint32(0x7FA0DEAD)  # a signalling NaN: any arithmetic on it gives other bits


class Form(NamedTuple):
    """An instruction's variant: columns of B, element, layout of B, whether D is added to, first register of A."""

    n: int
    element: str
    transposed: bool
    accumulate: bool
    a_first: int | None


class _Issued(NamedTuple):
    """An instruction of one thread that is not complete: `a` is an array of registers, or a descriptor.

    seen: the registers of A at the issue, or nothing. shared: bytes of A (from shared memory) and B when the first
    thread of the warpgroup issued it.
    """

    form: Form
    sums: NDArray[np.float32]
    a: Any
    words: Any
    b: int
    seen: NDArray[np.uint32] | None
    shared: tuple[Any, ...]


class _Read:
    """What an instruction read from shared memory at its first issue, and how many threads have issued it."""

    def __init__(self, shared: tuple[Any, ...]) -> None:
        self.shared, self.threads = shared, 0


class _Thread:
    """What one thread has under way."""

    def __init__(self) -> None:
        self.issued = 0
        self.open: list[_Issued] = []
        self.batches: deque[list[_Issued]] = deque()
        self.fenced: dict[int, NDArray[Any]] = {}  # by identity of an array: values at the last fence, NaN if not named
        self.sums: dict[int, NDArray[np.float32]] = {}  # by identity: what accumulators in flight will hold
        self.pending: dict[int, int] = {}  # by identity: instructions that will write them


def _this_thread() -> _Thread:
    thread: Any = threading.current_thread()
    if not hasattr(thread, "atomflow_wgmma"):
        thread.atomflow_wgmma = _Thread()
    state: _Thread = thread.atomflow_wgmma
    return state


def _bits(array: Any) -> NDArray[np.uint32]:
    """A copy."""
    return np.array(array).view(np.uint32)


def fence(registers: tuple[Any, ...], arrays: tuple[Any, ...]) -> None:
    """Note the values of the registers that are named."""
    state = _this_thread()
    for part, array in zip(registers, arrays, strict=True):
        seen = state.fenced.get(id(array), np.full(array.size, -1, np.int64))
        index = slice(part.first, part.first + part.count)
        seen[index] = _bits(array)[index]
        state.fenced[id(array)] = seen


def _check_fenced(state: _Thread, array: Any, first: int, count: int, what: str) -> None:
    seen = state.fenced.get(id(array))
    index = slice(first, first + count)
    if seen is None or (seen[index] != _bits(array)[index]).any():
        raise RuntimeError(f"wgmma: {what} was written after the last fence that names it, or never fenced")


def issue(form: Form, sums: Any, a: Any, words: Any, b: int) -> None:
    """Note the instruction; nothing is computed yet."""
    state = _this_thread()
    accumulators = sums[: form.n // 2]
    if state.pending.get(id(sums), 0):
        _check_untouched(accumulators)
    else:
        if form.accumulate:
            _check_fenced(state, sums, 0, form.n // 2, "an accumulator")
        state.sums[id(sums)] = accumulators.copy()
        accumulators.view(np.uint32)[:] = _IN_FLIGHT
    state.pending[id(sums)] = state.pending.get(id(sums), 0) + 1
    seen = None
    if form.a_first is not None:
        _check_fenced(state, a, form.a_first, 4, "a register of A")
        seen = _bits(a[form.a_first : form.a_first + 4])
    shared = _shared_at_first_issue(state, form, a, words, b)
    state.open.append(_Issued(form, sums, a if seen is not None else int(a), words, int(b), seen, shared))


def _shared_at_first_issue(state: _Thread, form: Form, a: Any, words: Any, b: int) -> tuple[NDArray[Any], ...]:
    """What the first thread of the warpgroup that issues this instruction reads: a later write may be another's."""
    thread: Any = threading.current_thread()
    key, state.issued = (thread.thread_id // _THREADS, state.issued), state.issued + 1
    with simulator.LOCK:
        reads = vars(thread._manager).setdefault("atomflow_wgmma_reads", {})  # noqa: SLF001  shared by the CTA
        if key not in reads:
            reads[key] = _Read(_read_shared(form, a, words, b))
        read: _Read = reads[key]
        read.threads += 1
        if read.threads == _THREADS:
            del reads[key]
    return read.shared


def commit() -> None:
    """End the batch."""
    state = _this_thread()
    state.batches.append(state.open)
    state.open = []


def wait(batches: int) -> None:
    """Compute the batches that are now complete, for the whole warpgroup, and write this thread's accumulators."""
    state, complete = _this_thread(), []
    while len(state.batches) > batches:
        complete += state.batches.popleft()
    products = simulator.exchange(complete, _multiply_all, lanes=_THREADS)
    thread: Any = threading.current_thread()
    lane, first_row = thread.thread_id % 32, thread.thread_id % _THREADS // 32 * 16
    row, column = first_row + lane // 4, lane % 4 * 2
    for issued, product in zip(complete, products, strict=True):
        key, n = id(issued.sums), issued.form.n
        # registers 4 j + 2 i + c: row + 8 i, column 8 j + column + c
        mine = product[row : row + 9 : 8].reshape(2, n // 8, 8)[:, :, column : column + 2].transpose(1, 0, 2)
        before = state.sums[key][: n // 2] if issued.form.accumulate else np.float64(0.0)
        with np.errstate(invalid="ignore", over="ignore"):
            state.sums[key] = (before + mine.reshape(-1)).astype(np.float32)
        state.pending[key] -= 1
        if not state.pending[key]:
            accumulators = issued.sums[: n // 2]
            _check_untouched(accumulators)
            accumulators[:] = state.sums[key]
            state.fenced.pop(key, None)


def _check_untouched(accumulators: Any) -> None:
    if (_bits(accumulators) != _IN_FLIGHT).any():
        raise RuntimeError("wgmma: an accumulator was written before the wait")


def _multiply_all(threads: list[list[_Issued]]) -> list[NDArray[np.float64]]:
    """A B of every instruction, [64, n], from what the 128 threads of a warpgroup issued."""
    products = []
    for instructions in zip(*threads, strict=True):
        first = instructions[0]
        if any(other.form != first.form or other.b != first.b for other in instructions):
            raise RuntimeError("wgmma: the threads of a warpgroup issued different instructions")
        shared = _read_shared(first.form, first.a, first.words, first.b)
        if any(now.tobytes() != then.tobytes() for now, then in zip(shared, first.shared, strict=True)):
            raise RuntimeError("wgmma: shared memory was written before the wait")
        if first.form.a_first is None:
            if any(other.a != first.a for other in instructions):
                raise RuntimeError("wgmma: the threads of a warpgroup have different descriptors of A")
            a = _numbers(shared[0], first.form.element)
        else:
            a = _numbers(_gather_a(instructions), first.form.element)
        b = shared[-1] if first.form.transposed else _numbers(shared[-1], first.form.element).T
        with np.errstate(invalid="ignore", over="ignore"):
            products.append(a @ b)
    return products


def _gather_a(instructions: tuple[_Issued, ...]) -> NDArray[np.uint8]:
    """A as bytes [64, 32], from registers."""
    words = np.empty((_ROWS, _STEP_BYTES // 4), np.uint32)
    for thread, issued in enumerate(instructions):
        first = issued.form.a_first or 0
        now = _bits(issued.a[first : first + 4])
        if (now != issued.seen).any():
            raise RuntimeError("wgmma: a register of A was written before the wait")
        row, word = thread // 32 * 16 + thread % 32 // 4, thread % 4
        words[row, word], words[row + 8, word], words[row, word + 4], words[row + 8, word + 4] = now
    return words.view(np.uint8)


def _numbers(rows: NDArray[np.uint8], element: str) -> NDArray[np.float64]:
    """Bytes [rows, 32] to numbers [rows, k]."""
    if element == "f16":
        return np.ascontiguousarray(rows).view(np.float16).astype(np.float64)
    from numba_atomflow.ops.fp8 import e4m3_table

    return e4m3_table()[rows].astype(np.float64)


def _read_shared(form: Form, a: Any, words: Any, b: int) -> tuple[NDArray[Any], ...]:
    """Bytes [64, 32] of A, if it is in shared memory; and B: bytes [n, 32], or numbers [16, n] if it is transposed."""
    memory = np.asarray(words[0 : len(words)]).view(np.uint8)
    read = () if form.a_first is not None else (memory[_k_major(int(a), _ROWS)],)
    if not form.transposed:
        return (*read, memory[_k_major(int(b), form.n)])
    start, leading, stride = _fields(int(b))
    k, column = np.arange(16)[:, None], np.arange(form.n)[None, :]
    address = start + column % 64 * 2 + column // 64 * leading + k % 8 * 128 + k // 8 * stride
    pairs = memory[_swizzled(address)[..., None] + np.arange(2)]
    return (*read, np.ascontiguousarray(pairs).view(np.float16)[..., 0].astype(np.float64))


def _k_major(descriptor: int, rows: int) -> NDArray[np.int64]:
    """Addresses of the bytes [rows, 32] of a k-step."""
    start, _, stride = _fields(descriptor)
    row, byte = np.arange(rows)[:, None], np.arange(_STEP_BYTES)[None, :]
    return _swizzled(start + row % 8 * 128 + row // 8 * stride + byte)


def _swizzled(address: NDArray[np.int64]) -> NDArray[np.int64]:
    """128-byte swizzle: bits 4-6 of an address XOR its bits 7-9."""
    return address ^ ((address >> 7 & 7) << 4)


def _fields(descriptor: int) -> tuple[int, int, int]:
    """Start address, leading and stride byte offsets."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if descriptor >> 62 != 1 or descriptor >> 46 & 0xFFFF:
        raise RuntimeError(f"wgmma: {descriptor:#x} is no descriptor of a 128-byte swizzle without base offset")
    if start & 0x380:
        raise RuntimeError(f"wgmma: address {start:#x} is in the middle of 8 swizzled rows")
    return start, leading, stride
