"""Every PTX instruction that the GPU kernels place by hand, each beside its meaning in Python.

This module is to the GPU what `simd.py` is to the CPU: no other one uses the compiler's extension API. A function
under `@_instruction` holds the instruction in its decorator and the meaning in its body. Compiled for a GPU, the
decorator wins and the body is dropped; in numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1) the body runs. The simulator
knows no warps: functions that exchange data between lanes meet at a barrier of 32 threads (`_exchange`).

16-byte accesses want 16-byte aligned addresses. An ``array, index`` pair becomes an address: index counts elements.
An address in shared memory (`shared_address`) counts bytes; in the simulator, from its beginning on.
Source of the instructions and of the layout of matrix fragments: PTX ISA 9.0, sections 9.7.9, 9.7.13 to 9.7.15.
"""

import inspect
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda
from numba.core import config
from numba.cuda import types

SIMULATED = bool(config.ENABLE_CUDASIM)

_ADDRESS = "address"  # stands for two arguments: an array and an index
_SHARED_ADDRESS = "shared address"  # the same of an array in shared memory: 32 bits
_ARRAY = "array"  # an array that only the simulator needs, beside an address in it
_REGISTER = {
    types.uint16: "h",
    types.uint32: "r",
    types.int32: "r",
    types.uint64: "l",
    types.float32: "f",
    _ADDRESS: "l",
    _SHARED_ADDRESS: "r",
}
_SHARED_SPACE = 3  # LLVM's number for it
_PLAIN_LOAD = "load"  # not assembly but the compiler's own load of a vector: it knows shared memory and folds offsets
_PLAIN_STORE = "store"  # and its own store of one

u16, u32, u64, f32 = types.uint16, types.uint32, types.uint64, types.float32


# --- one function, two lives -------------------------------------------------------------------------------------


def _instruction(
    assembly: str, results: tuple[Any, ...], arguments: tuple[Any, ...], *, effect: bool = False, memory: bool = False
) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: an inline-PTX device function whose meaning is the decorated Python function.

    Args:
        assembly: with $0, $1, ... for results, then arguments.
        results: numba types; several come back as a tuple.
        arguments: numba types, to which the caller's values are cast, or `_ADDRESS`.
        effect: it may be neither dropped nor moved past its like.
        memory: it reads or writes memory that others write: no access may be moved past it.
    """

    def decorate(meaning: Callable[..., Any]) -> Any:
        if SIMULATED:
            return meaning
        from numba.cuda.extending import intrinsic

        names = list(inspect.signature(meaning).parameters)

        def typing(typing_context: Any, *given: Any) -> Any:
            del typing_context
            result = types.void if not results else results[0] if len(results) == 1 else types.Tuple(results)
            signature = result(*_expected(given, arguments))
            return signature, _Emitter(assembly, results, arguments, effect or memory, memory)

        parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_ONLY) for n in ("typing_context", *names)]
        typing.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        typing.__name__ = typing.__qualname__ = meaning.__name__
        typing.__doc__ = meaning.__doc__
        return intrinsic(typing)

    return decorate


def _expected(given: tuple[Any, ...], arguments: tuple[Any, ...]) -> list[Any]:
    """Types that the lowered call takes: those declared; an address keeps its array's type and an int64 index."""
    rest, expected = iter(given), []
    for argument in arguments:
        if argument is _ARRAY:
            expected.append(next(rest))
        elif argument in {_ADDRESS, _SHARED_ADDRESS}:
            expected += [next(rest), types.int64]
            next(rest)
        else:
            expected.append(argument)
            next(rest)
    return expected


class _Emitter:
    """Lowers a call to one inline-assembly value."""

    def __init__(
        self, assembly: str, results: tuple[Any, ...], arguments: tuple[Any, ...], effect: bool, memory: bool
    ) -> None:
        self.assembly, self.results, self.arguments = assembly, results, arguments
        self.effect, self.memory = effect, memory
        self.__name__ = "emit"

    def __call__(self, context: Any, builder: Any, signature: Any, args: Any) -> Any:
        from llvmlite import ir

        values, letters, rest = [], [], iter(zip(signature.args, args, strict=True))
        for argument in self.arguments:
            kind, value = next(rest)
            if argument is _ARRAY:
                continue
            if argument in {_ADDRESS, _SHARED_ADDRESS}:
                array = context.make_array(kind)(context, builder, value)
                value = builder.gep(array.data, [next(rest)[1]])
                if argument is _SHARED_ADDRESS:
                    value = builder.addrspacecast(value, value.type.pointee.as_pointer(_SHARED_SPACE))
                    value = builder.ptrtoint(value, ir.IntType(32))
                elif self.assembly not in {_PLAIN_LOAD, _PLAIN_STORE}:
                    value = builder.ptrtoint(value, ir.IntType(64))
            values.append(value)
            letters.append(_REGISTER[argument])
        if self.assembly == _PLAIN_LOAD:
            vector = ir.VectorType(context.get_value_type(self.results[0]), len(self.results))
            loaded = builder.load(builder.bitcast(values[0], vector.as_pointer()), align=4 * len(self.results))
            parts = [builder.extract_element(loaded, ir.Constant(ir.IntType(32), i)) for i in range(len(self.results))]
            return context.make_tuple(builder, signature.return_type, parts)
        if self.assembly == _PLAIN_STORE:
            address, *elements = values
            vector = ir.Constant(ir.VectorType(elements[0].type, len(elements)), ir.Undefined)
            for i, element in enumerate(elements):
                vector = builder.insert_element(vector, element, ir.Constant(ir.IntType(32), i))
            builder.store(vector, builder.bitcast(address, vector.type.as_pointer()), align=4 * len(elements))
            return context.get_dummy_value()
        outputs = [context.get_value_type(result) for result in self.results]
        returned = ir.VoidType() if not outputs else outputs[0]
        if len(outputs) > 1:
            returned = ir.LiteralStructType(outputs)
        constraints = [f"={_REGISTER[result]}" for result in self.results] + letters
        if self.memory:
            constraints.append("~{memory}")
        function_type = ir.FunctionType(returned, [value.type for value in values])
        text = ir.InlineAsm(function_type, self.assembly, ",".join(constraints), side_effect=self.effect)
        out = builder.call(text, values)
        if not outputs:
            return context.get_dummy_value()
        if len(outputs) == 1:
            return out
        parts = [builder.extract_value(out, i) for i in range(len(outputs))]
        return context.make_tuple(builder, signature.return_type, parts)


def device_function(function: Callable[..., Any]) -> Any:
    """Decorator: a building block of kernels, inlined before types are known: what it is given may be a function."""
    return cuda.jit(device=True)(function) if SIMULATED else cuda.jit(device=True, inline="always")(function)


def large_device_function(function: Callable[..., Any]) -> Any:
    """Decorator: the same for large ones, typed and compiled by themselves and inlined by the machine's own compiler.

    numba takes minutes over a kernel into which it has to inline thousands of statements.
    """
    return cuda.jit(device=True)(function) if SIMULATED else cuda.jit(device=True, forceinline=True)(function)


@contextmanager
def compiling_for(capability: tuple[int, int]) -> Iterator[None]:
    """While it is open, numba-cuda compiles device functions for this architecture, and asks no driver which it is."""
    from numba.cuda import dispatcher

    asked = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
    try:
        yield
    finally:
        dispatcher.get_current_device = asked


def kernel(threads: int, blocks: int) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: a kernel of `threads` threads per block, with registers to spare for `blocks` per multiprocessor."""
    decorator: Callable[[Callable[..., Any]], Any] = (
        cuda.jit if SIMULATED else cuda.jit(launch_bounds=(threads, blocks))
    )
    return decorator


# --- the simulator's warps ---------------------------------------------------------------------------------------


class _Warp:
    """Where 32 simulated threads meet: each brings a value, all see all values.

    A lane sleeps at a gate of its own until the last one opens them: in `threading.Barrier` all of them would first
    queue for one lock.
    """

    def __init__(self) -> None:
        self.brought: list[Any] = [None] * 32
        self.seen: Any = None
        self.arrived, self.broken = 0, False
        self.lock, self.gates = threading.Lock(), [threading.Lock() for _ in range(32)]
        for gate in self.gates:
            gate.acquire()

    def meet(self, lane: int, value: Any, combine: Callable[[list[Any]], Any]) -> Any:
        """combine(values of all lanes), computed by the last to come."""
        with self.lock:
            self.brought[lane] = value
            self.arrived = (self.arrived + 1) % 32
            last = self.arrived == 0
        if last:
            brought, self.brought = self.brought, [None] * 32  # a lane may bring its next value before others see this
            self.seen = combine(brought)
            for other, gate in enumerate(self.gates):
                if other != lane:
                    gate.release()
        elif not self.gates[lane].acquire(timeout=120):
            self.abort()
        if self.broken:
            raise threading.BrokenBarrierError
        return self.seen

    def abort(self) -> None:
        """Nobody waits any more: a lane failed, or never came."""
        self.broken = True
        for gate in self.gates:
            with suppress(RuntimeError):  # it stands open
                gate.release()


_warp_lock = threading.Lock()
_BEGUN = time.perf_counter_ns()


def _lane() -> int:
    return int(threading.current_thread().thread_id % 32)  # type: ignore[attr-defined]


def _exchange(value: Any, combine: Callable[[list[Any]], Any] = list) -> Any:
    """combine(values of all 32 lanes), computed once per warp; every lane must call."""
    thread: Any = threading.current_thread()
    number = thread.thread_id // 32
    with _warp_lock:
        warps = vars(thread._manager).setdefault("atomflow_warps", {})  # noqa: SLF001  what lanes of a block share
        if number not in warps:
            warps[number] = _Warp()
    return warps[number].meet(thread.thread_id % 32, value, combine)


def _halves(word: int) -> tuple[float, float]:
    """The two float16 of a 32-bit word, low one first."""
    low, high = struct.unpack("<ee", struct.pack("<I", int(word)))
    return low, high


# --- memory ------------------------------------------------------------------------------------------------------


@_instruction("ld.global.nc.L1::no_allocate.v4.u32 {$0, $1, $2, $3}, [$4];", (u32,) * 4, (_ADDRESS,), effect=True)
def load_stream_16(array, index):
    """16 bytes of memory that no kernel writes, read once: weights."""
    return tuple(int(array[index + i]) for i in range(4))


@_instruction("ld.global.nc.f32 $0, [$1];", (f32,), (_ADDRESS,), effect=True)
def load_constant_f32(array, index):
    """A float32, out of a uint32 array that no kernel writes."""
    return np.uint32(array[index]).view(np.float32)


@_instruction("ld.global.nc.v2.f32 {$0, $1}, [$2];", (f32, f32), (_ADDRESS,), effect=True)
def load_constant_f32x2(array, index):
    """Two float32, out of a uint32 array that no kernel writes."""
    return tuple(np.uint32(array[index + i]).view(np.float32) for i in range(2))


@_instruction(_PLAIN_LOAD, (u32,) * 4, (_ADDRESS,))
def load_16(array, index):
    """16 bytes of memory that an earlier kernel wrote."""
    return tuple(int(array[index + i]) for i in range(4))


@_instruction(_PLAIN_LOAD, (u32,) * 2, (_ADDRESS,))
def load_8(array, index):
    """8 bytes of memory that an earlier kernel wrote."""
    return tuple(int(array[index + i]) for i in range(2))


@_instruction("prefetch.global.L2 [$0];", (), (_ADDRESS,), effect=True)
def prefetch(array, index):
    """Ask for the cache line of an element to be brought into the second-level cache. It changes nothing."""


@_instruction(_PLAIN_LOAD, (f32,) * 4, (_ADDRESS,))
def load_f32x4(array, index):
    """Four float32 that an earlier kernel wrote, out of a float32 array or of a uint32 array of their bits."""
    return tuple(np.asarray(array[index + i]).view(np.float32)[()] for i in range(4))


@_instruction(_PLAIN_LOAD, (f32,) * 2, (_ADDRESS,))
def load_f32x2(array, index):
    """Two of them."""
    return tuple(np.asarray(array[index + i]).view(np.float32)[()] for i in range(2))


@_instruction("ld.relaxed.gpu.global.f32 $0, [$1];", (f32,), (_ADDRESS,), memory=True)
def load_remote_f32(array, index):
    """A float32 that another block of this launch wrote, past the first-level cache."""
    return np.float32(array[index])


@_instruction("ld.relaxed.gpu.global.v4.f32 {$0, $1, $2, $3}, [$4];", (f32,) * 4, (_ADDRESS,), memory=True)
def load_remote_f32x4(array, index):
    """Four float32 that another block of this launch wrote, past the first-level cache."""
    return tuple(np.float32(array[index + i]) for i in range(4))


def _be_patient(index: int, words: tuple[int, int]) -> None:
    """Sleep, longer every time, if this thread saw the same there before: waiting leaves the writers time."""
    looks = vars(threading.current_thread()).setdefault("atomflow_looks", {})
    before, nap = looks.get(index, (None, 0.0))
    nap = min(2 * nap, 0.2) if before == words else 0.002
    if before == words:
        time.sleep(nap)
    looks[index] = words, nap


@_instruction(
    "{ .reg .b64 a, b; ld.relaxed.gpu.global.v2.b64 {a, b}, [$4]; mov.b64 {$0, $1}, a; mov.b64 {$2, $3}, b; }",
    (u32,) * 4,
    (_ADDRESS,),
    memory=True,
)
def load_words(array, index):
    """Two words of 8 bytes that other blocks of this launch may be writing, as halves (low, high, low, high).

    Each word is read whole: both halves are of one `publish`. index: even.
    """
    first, second = int(array[index]), int(array[index + 1])
    _be_patient(int(index), (first, second))
    return first & 0xFFFFFFFF, first >> 32, second & 0xFFFFFFFF, second >> 32


@_instruction(
    "{ .reg .b64 a; mov.b64 a, {$1, $2}; st.relaxed.gpu.global.b64 [$0], a; }", (), (_ADDRESS, u32, u32), memory=True
)
def publish(array, index, low, high):
    """Write a word of 8 bytes whole, for readers in other blocks of this launch."""
    array[index] = int(low) | int(high) << 32


@_instruction(_PLAIN_LOAD, (u32,) * 4, (_ADDRESS,))
def load_block_16(array, index):
    """16 bytes of shared memory."""
    return tuple(int(array[index + i]) for i in range(4))


@_instruction(_PLAIN_STORE, (), (_ADDRESS,) + (u32,) * 4)
def store_block_16(array, index, a, b, c, d):
    """16 bytes into shared memory."""
    for i, word in enumerate((a, b, c, d)):
        array[index + i] = word


@_instruction(_PLAIN_STORE, (), (_ADDRESS, u32, u32))
def store_block_8(array, index, a, b):
    """8 bytes into shared memory."""
    array[index], array[index + 1] = a, b


# --- numbers -----------------------------------------------------------------------------------------------------


@_instruction(
    "{ .reg .b32 s, t, w; shl.b32 w, $2, 8;"
    " shr.u32 t, $2, 1; and.b32 t, t, 0x3f803f80; and.b32 s, $2, 0x80008000; or.b32 $0, s, t;"
    " shr.u32 t, w, 1; and.b32 t, t, 0x3f803f80; and.b32 s, w, 0x80008000; or.b32 $1, s, t; }",
    (u32, u32),
    (u32,),
)
def decode_fp8_bits(word):
    """Four E4M3 codes to two pairs of float16, times 2^-8: bytes 1 and 3, then bytes 0 and 2. Every architecture.

    A code's seven magnitude bits go where float16 keeps exponent and mantissa; the biases differ by 15 - 7 = 8.
    """
    word = int(word)
    low = (word << 8) & 0xFFFFFFFF
    return tuple((w >> 1) & 0x3F803F80 | w & 0x80008000 for w in (word, low))


@_instruction(
    "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, h; }", (u32, u32), (u32,)
)
def decode_fp8_cvt(word):
    """Four E4M3 codes to two pairs of float16: bytes 0 and 1, then bytes 2 and 3. From sm_89 on."""
    from numba_atomflow.ops.fp8 import e4m3_table

    codes = np.frombuffer(struct.pack("<I", int(word)), np.uint8)
    pairs = e4m3_table()[codes].astype(np.float16).view(np.uint32)
    return int(pairs[0]), int(pairs[1])


@_instruction("cvt.rn.f16x2.f32 $0, $2, $1;", (u32,), (f32, f32))
def pack_f16x2(low, high):
    """Two float32 rounded to float16 in one word."""
    with np.errstate(over="ignore"):
        return int(np.array([low, high], np.float32).astype(np.float16).view(np.uint32)[0])


@_instruction("cvt.rn.f16.f32 $0, $1;", (u16,), (f32,))
def f16_bits(value):
    """A float32 rounded to float16, as its 16 bits."""
    with np.errstate(over="ignore"):
        return int(np.float32(value).astype(np.float16).view(np.uint16))


@_instruction("{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }", (f32, f32), (u32,))
def unpack_f16x2(word):
    """The two float16 of a word, as float32 (exact)."""
    low, high = _halves(word)
    return np.float32(low), np.float32(high)


@_instruction("mov.b32 $0, $1;", (u32,), (f32,))
def f32_bits(value):
    """The 32 bits of a float32."""
    return int(np.float32(value).view(np.uint32))


@_instruction("mov.b32 $0, $1;", (f32,), (u32,))
def bits_f32(word):
    """The float32 with these 32 bits."""
    return np.uint32(word).view(np.float32)


@_instruction("prmt.b32 $0, $1, $2, 0x5410;", (u32,), (u32, u32))
def low_halves(a, b):
    """The low 16 bits of a, and those of b above them."""
    return (int(a) & 0xFFFF) | (int(b) & 0xFFFF) << 16


@_instruction("prmt.b32 $0, $1, $2, 0x7632;", (u32,), (u32, u32))
def high_halves(a, b):
    """The high 16 bits of a, and those of b above them."""
    return int(a) >> 16 | int(b) & 0xFFFF0000


@_instruction("rsqrt.approx.ftz.f32 $0, $1;", (f32,), (f32,))
def reciprocal_root(x):
    """1 / sqrt(x) of a normal number above 0; relative error about 2^-22.9."""
    return np.float32(1.0 / np.sqrt(np.float64(x)))


@_instruction("ex2.approx.ftz.f32 $0, $1;", (f32,), (f32,))
def exp2(x):
    """2^x; relative error about 2^-22, results below 2^-126 become 0."""
    with np.errstate(over="ignore"):
        value = np.exp2(np.float64(max(float(x), -1000.0)))
        return np.float32(value if value >= 2.0**-126 else 0.0)


@_instruction(
    "{ .reg .u64 z, t; add.u64 z, $2, 1; mul.lo.u64 z, z, 0x9E3779B97F4A7C15; add.u64 z, z, $1;"
    " shr.u64 t, z, 30; xor.b64 z, z, t; mul.lo.u64 z, z, 0xBF58476D1CE4E5B9;"
    " shr.u64 t, z, 27; xor.b64 z, z, t; mul.lo.u64 z, z, 0x94D049BB133111EB;"
    " shr.u64 t, z, 31; xor.b64 z, z, t; shr.u64 $0, z, 11; }",
    (u64,),
    (u64, u64),
)
def random_53_bits(seed, counter):
    """Draw number `counter` of the stream `seed`: SplitMix64's finaliser, as `numba_atomflow.sampling.uniform`."""
    mask = (1 << 64) - 1
    z = (int(seed) + (int(counter) + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 11


# --- lanes of a warp ---------------------------------------------------------------------------------------------


@_instruction("bar.warp.sync 0xffffffff;", (), (), memory=True)
def sync_warp():
    """All lanes arrive; what they wrote to shared memory is seen by the others."""
    _exchange(None)


@_instruction(
    "{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; popc.b32 $0, $0; }",
    (u32,),
    (u32,),
    effect=True,
)
def count_lanes(yes):
    """How many lanes of the warp say something else than 0. All of them must ask."""
    return _exchange(int(yes), lambda said: sum(each != 0 for each in said))


@_instruction("bar.sync $0, $1;", (), (u32, u32), memory=True)
def sync_threads(number, threads):
    """`syncthreads` for so many threads of the block, whole warps, at a barrier (1 to 15) of their own."""
    thread: Any = threading.current_thread()
    with _warp_lock:
        barriers = vars(thread._manager).setdefault("atomflow_barriers", {})  # noqa: SLF001  as in `_exchange`
        if number not in barriers:
            barriers[number] = threading.Barrier(int(threads), timeout=120)
    barriers[number].wait()


@_instruction("shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", (f32,), (f32, u32), effect=True)
def shuffle_xor_f32(value, lanes):
    """The value of the lane whose number differs from the own one in the bits `lanes`."""
    return _exchange(np.float32(value))[_lane() ^ int(lanes)]


@_instruction("shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", (u32,), (u32, u32), effect=True)
def shuffle_xor_u32(value, lanes):
    """The value of the lane whose number differs from the own one in the bits `lanes`."""
    return _exchange(int(value))[_lane() ^ int(lanes)]


@device_function
def warp_sum(value):
    """The sum of a float32 over all lanes of the warp, in every lane: a butterfly of five shuffles."""
    for step in range(5):
        value += shuffle_xor_f32(value, 16 >> step)
    return value


def _multiply_fragments(lanes: list[Any]) -> tuple[Any, Any]:
    """D = A B + C of one warp: rows 0-7 and rows 8-15, float32 [8, 8] each."""
    a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for lane, (a0, a1, a2, a3, b0, b1, c0, c1, c2, c3) in enumerate(lanes):
        row, k = lane >> 2, (lane & 3) * 2
        a[row, k : k + 2], a[row + 8, k : k + 2] = _halves(a0), _halves(a1)
        a[row, k + 8 : k + 10], a[row + 8, k + 8 : k + 10] = _halves(a2), _halves(a3)
        b[k : k + 2, row], b[k + 8 : k + 10, row] = _halves(b0), _halves(b1)
        c[row, k : k + 2], c[row + 8, k : k + 2] = (c0, c1), (c2, c3)
    with np.errstate(invalid="ignore", over="ignore"):
        d = (a @ b + c).astype(np.float32)
    return d[:8], d[8:]


@_instruction(
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
    " {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
    (f32,) * 4,
    (u32,) * 6 + (f32,) * 4,
)
def mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """D = A B + C with A float16 [16, 16], B float16 [16, 8], C and D float32 [16, 8], spread over a warp.

    Lane 4 g + t holds, as pairs (x, x + 1): A (row g, k 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); B (k 2t,
    column g), (2t + 8, g); C and D (row g, column 2t), (g + 8, 2t).
    """
    top, bottom = _exchange((a0, a1, a2, a3, b0, b1, c0, c1, c2, c3), _multiply_fragments)
    row, column = _lane() >> 2, (_lane() & 3) * 2
    return top[row, column], top[row, column + 1], bottom[row, column], bottom[row, column + 1]


@_instruction("nanosleep.u32 $0;", (), (u32,), effect=True)
def pause(nanoseconds):
    """Do nothing for about so long."""
    time.sleep(int(nanoseconds) * 1e-9)


@_instruction("mov.u64 $0, %globaltimer;", (u64,), (), effect=True)
def nanoseconds():
    """A clock that all SMs share; reading it takes long."""
    return time.perf_counter_ns()


@_instruction("mov.u64 $0, %clock64;", (u64,), (), effect=True)
def cycles():
    """The multiprocessor's own clock."""
    return time.perf_counter_ns()


@_instruction("mov.u32 $0, %clock;", (u32,), (), effect=True)
def short_cycles():
    """The lower half of the multiprocessor's own clock."""
    return (time.perf_counter_ns() - _BEGUN) >> 8 & 0x7FFFFFFF


# --- between kernels ---------------------------------------------------------------------------------------------


@_instruction("griddepcontrol.wait;", (), (), memory=True)
def wait_for_previous_kernel():
    """Programmatic dependent launch: block until the kernel before has ended. From sm_90 on."""


@_instruction("griddepcontrol.launch_dependents;", (), (), memory=True)
def let_next_kernel_start():
    """Programmatic dependent launch: the next kernel's blocks may take the places of those that end. From sm_90 on."""


# --- the copy engine: memory to shared memory, past the registers -------------------------------------------------


@_instruction("mov.u32 $0, $1;", (u32,), (_SHARED_ADDRESS,))
def shared_address(array, index):
    """The address of an element of shared memory."""
    return int(index) * array.itemsize


_ASK = (  # whether a phase is complete; {}: at once (test_wait), or after a while (try_wait)
    "{{ .reg .pred p; mbarrier.{}.parity.shared::cta.b64 p, [$1], $2; selp.u32 $0, 1, 0, p; }}"
)


@_instruction("mbarrier.init.shared::cta.b64 [$0], $1;", (), (_ARRAY, u32, u32), memory=True)
def barrier_init(barriers, address, arrivals):
    """Make an mbarrier out of 8 bytes of shared memory. `fence_barriers` before other threads or copies use it."""
    with _warp_lock:
        barriers[int(address) // 8] = _barrier_word(0, int(arrivals), int(arrivals), 0)


@_instruction("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;", (), (), memory=True)
def fence_barriers():
    """What `barrier_init` wrote is seen by copies; `syncthreads` then makes it so for the other threads."""


@_instruction("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", (), (_ARRAY, u32, u32), memory=True)
def barrier_expect(barriers, address, nbytes):
    """Arrive, and make the barrier's phase wait for `nbytes` of copies as well."""
    _advance_barrier(barriers, address, 1, int(nbytes))


@_instruction(
    "{ .reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @!p bra WAIT; }",
    (),
    (_ARRAY, u32, u32),
    memory=True,
)
def barrier_wait(barriers, address, parity):
    """Wait until the phase of this parity (0, 1, 0, ...) is complete."""
    for _ in range(1_200_000):
        if _is_complete(barriers, address, parity):
            return
        time.sleep(1e-4)
    raise RuntimeError("a barrier's phase never completed")


@_instruction("mbarrier.arrive.shared::cta.b64 _, [$0];", (), (_ARRAY, u32), memory=True)
def barrier_arrive(barriers, address):
    """Arrive."""
    _advance_barrier(barriers, address, 1, 0)


@_instruction(_ASK.format("try_wait"), (u32,), (_ARRAY, u32, u32), memory=True)
def barrier_ready(barriers, address, parity):
    """1 if the phase of this parity is complete, perhaps after a short wait for it; else 0."""
    complete = _is_complete(barriers, address, parity)
    if not complete:
        time.sleep(1e-3)
    return int(complete)


@_instruction(_ASK.format("test_wait"), (u32,), (_ARRAY, u32, u32), memory=True)
def barrier_passed(barriers, address, parity):
    """1 if the phase of this parity is complete, else 0; at once."""
    return int(_is_complete(barriers, address, parity))


@_instruction(
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
    (),
    (_ARRAY, u32, _ADDRESS, u32, _ARRAY, u32),
    memory=True,
)
def bulk_copy(target, at, source, start, nbytes, barriers, address):
    """Start a copy of `nbytes` (a multiple of 16, as are both addresses), from element `start` of global memory on to
    address `at` of shared memory; the barrier at `address` counts it when it has landed. From sm_90 on.
    """
    begin, count = int(at) // target.itemsize, int(nbytes) // target.itemsize
    target[begin : begin + count] = source[start : start + count]
    _advance_barrier(barriers, address, 0, -int(nbytes))


@_instruction("cp.async.bulk.prefetch.L2.global [$0], $1;", (), (_ADDRESS, u32), memory=True)
def prefetch_bulk(source, start, nbytes):
    """Ask for `nbytes` (a multiple of 16, as is the address) to come into the second-level cache. From sm_90 on."""
    end = int(start) + int(nbytes) // source.itemsize
    if int(nbytes) % 16 or int(start) * source.itemsize % 16 or not 0 <= start < end <= source.size:
        raise IndexError(f"words {start} to {end} of {source.size} cannot be asked for in one piece")


def _is_complete(barriers: Any, address: Any, parity: Any) -> bool:
    """Whether a simulated mbarrier's phase of this parity is over."""
    with _warp_lock:
        return int(barriers[int(address) // 8]) & 1 != int(parity) & 1


def _barrier_word(phase: int, pending: int, arrivals: int, nbytes: int) -> int:
    """A simulated mbarrier: the phase's parity, arrivals to come, arrivals of every phase, bytes to come (biased)."""
    return phase & 1 | pending << 1 | arrivals << 16 | (nbytes + (1 << 30)) << 32


def _advance_barrier(barriers: Any, address: Any, arrived: int, nbytes: int) -> None:
    index = int(address) // 8
    with _warp_lock:
        word = int(barriers[index])
        phase, pending, arrivals = word & 1, (word >> 1 & 0x7FFF) - arrived, word >> 16 & 0xFFFF
        expected = (word >> 32) - (1 << 30) + nbytes
        if pending == 0 and expected == 0:
            phase, pending = phase ^ 1, arrivals
        barriers[index] = _barrier_word(phase, pending, arrivals, expected)
