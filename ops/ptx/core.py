"""How a Python function becomes a PTX instruction: the only user of numba-cuda's extension API.

`@instruction` takes the assembly; the decorated Python body defines what it computes. Compiled for a GPU, the assembly
is emitted and the body is dropped; in numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1) the body runs.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from numba import cuda
from numba.core import config
from numba.cuda import types

SIMULATED = bool(config.ENABLE_CUDASIM)

# Kinds of arguments beside numba's types:
ADDRESS = "address"  # two Python arguments, an array and an element index, that become a 64-bit address
SHARED_ADDRESS = "shared address"  # the same for an array in shared memory: a 32-bit address
ARRAY = "array"  # an array that only the simulator uses

_REGISTER = {  # constraint letters of inline assembly
    types.uint16: "h",
    types.uint32: "r",
    types.int32: "r",
    types.uint64: "l",
    types.int64: "l",
    types.float32: "f",
    ADDRESS: "l",
    SHARED_ADDRESS: "r",
}
_SHARED_SPACE = 3  # LLVM's address space of shared memory

# In place of assembly: LLVM's own vector load and store, which infer the address space and fold constant offsets.
VECTOR_LOAD = "load"
VECTOR_STORE = "store"

u16, u32, u64, i64, f32 = types.uint16, types.uint32, types.uint64, types.int64, types.float32


@dataclass(frozen=True)
class Registers:
    """Kind of argument: a local array, of which `count` elements from `first` on are operands, in registers.

    In the assembly they are numbered as results if they are `written` (operands that are read and written: no use of
    these registers moves past the instruction), else as arguments.
    """

    count: int
    first: int = 0
    written: bool = True


def instruction(
    assembly: str, results: tuple[Any, ...], arguments: tuple[Any, ...], *, effect: bool = False, memory: bool = False
) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: a device function of one PTX instruction, whose Python body is run by the simulator.

    Args:
        assembly: with $0, $1, ... for results, then written registers, then arguments.
        results: numba types; several are returned as a tuple.
        arguments: numba types, to which the caller's values are cast, or `ADDRESS`, `SHARED_ADDRESS`, `ARRAY`,
            `Registers`.
        effect: volatile: neither removed nor reordered with other volatile instructions.
        memory: volatile and a compiler barrier for memory: no access is moved across it.
    """

    def decorate(body: Callable[..., Any]) -> Any:
        if SIMULATED:
            return body
        from numba.cuda.extending import intrinsic

        names = _parameter_names(body, arguments)

        def typing(typing_context: Any, *actual: Any) -> Any:
            del typing_context
            result = types.void if not results else results[0] if len(results) == 1 else types.Tuple(results)
            signature = result(*_lowered_types(actual, arguments))
            return signature, _Emitter(assembly, results, arguments, effect or memory, memory)

        parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_ONLY) for n in ("typing_context", *names)]
        typing.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        typing.__name__ = typing.__qualname__ = body.__name__
        typing.__doc__ = body.__doc__
        return intrinsic(typing)

    return decorate


def _parameter_names(body: Callable[..., Any], arguments: tuple[Any, ...]) -> list[str]:
    """Those of the body; one that takes any number (`*arrays`) has as many as there are arguments."""
    parameters = inspect.signature(body).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return [f"argument_{i}" for i in range(len(arguments))]
    return [parameter.name for parameter in parameters]


def _lowered_types(actual: tuple[Any, ...], arguments: tuple[Any, ...]) -> list[Any]:
    """Types of the lowered call: those declared; an address keeps its array's type and has an int64 index."""
    rest, expected = iter(actual), []
    for argument in arguments:
        if argument is ARRAY or isinstance(argument, Registers):
            expected.append(next(rest))
        elif argument in {ADDRESS, SHARED_ADDRESS}:
            expected += [next(rest), types.int64]
            next(rest)
        else:
            expected.append(argument)
            next(rest)
    return expected


class _Emitter:
    """Lowers a call to inline assembly, or to a vector access."""

    def __init__(
        self, assembly: str, results: tuple[Any, ...], arguments: tuple[Any, ...], effect: bool, memory: bool
    ) -> None:
        self.assembly, self.results, self.arguments = assembly, results, arguments
        self.effect, self.memory = effect, memory
        self.__name__ = "emit"

    def __call__(self, context: Any, builder: Any, signature: Any, args: Any) -> Any:
        from llvmlite import ir

        values, letters, rest = [], [], iter(zip(signature.args, args, strict=True))
        written: list[tuple[Any, Any]] = []  # type and address of each written register
        for argument in self.arguments:
            kind, value = next(rest)
            if argument is ARRAY:
                continue
            if isinstance(argument, Registers):
                data = context.make_array(kind)(context, builder, value).data
                for i in range(argument.first, argument.first + argument.count):
                    address = builder.gep(data, [ir.Constant(ir.IntType(64), i)])
                    if argument.written:
                        written.append((kind.dtype, address))
                    else:
                        values.append(builder.load(address))
                        letters.append(_REGISTER[kind.dtype])
                continue
            if argument in {ADDRESS, SHARED_ADDRESS}:
                array = context.make_array(kind)(context, builder, value)
                value = builder.gep(array.data, [next(rest)[1]])
                if argument is SHARED_ADDRESS:
                    value = builder.addrspacecast(value, value.type.pointee.as_pointer(_SHARED_SPACE))
                    value = builder.ptrtoint(value, ir.IntType(32))
                elif self.assembly not in {VECTOR_LOAD, VECTOR_STORE}:
                    value = builder.ptrtoint(value, ir.IntType(64))
            values.append(value)
            letters.append(_REGISTER[argument])
        if self.assembly == VECTOR_LOAD:
            vector = ir.VectorType(context.get_value_type(self.results[0]), len(self.results))
            loaded = builder.load(builder.bitcast(values[0], vector.as_pointer()), align=4 * len(self.results))
            parts = [builder.extract_element(loaded, ir.Constant(ir.IntType(32), i)) for i in range(len(self.results))]
            if len(parts) == 1:
                return parts[0]
            return context.make_tuple(builder, signature.return_type, parts)
        if self.assembly == VECTOR_STORE:
            address, *elements = values
            vector = ir.Constant(ir.VectorType(elements[0].type, len(elements)), ir.Undefined)
            for i, element in enumerate(elements):
                vector = builder.insert_element(vector, element, ir.Constant(ir.IntType(32), i))
            builder.store(vector, builder.bitcast(address, vector.type.as_pointer()), align=4 * len(elements))
            return context.get_dummy_value()
        outputs = [context.get_value_type(result) for result in (*self.results, *(kind for kind, _ in written))]
        returned = ir.VoidType() if not outputs else outputs[0]
        if len(outputs) > 1:
            returned = ir.LiteralStructType(outputs)
        constraints = [f"={_REGISTER[result]}" for result in (*self.results, *(kind for kind, _ in written))] + letters
        constraints += [str(len(self.results) + i) for i in range(len(written))]
        values += [builder.load(address) for _, address in written]
        if self.memory:
            constraints.append("~{memory}")
        function_type = ir.FunctionType(returned, [value.type for value in values])
        text = ir.InlineAsm(function_type, self.assembly, ",".join(constraints), side_effect=self.effect)
        out = builder.call(text, values)
        parts = [out] if len(outputs) == 1 else [builder.extract_value(out, i) for i in range(len(outputs))]
        for part, (_, address) in zip(parts[len(self.results) :], written, strict=True):
            builder.store(part, address)
        if not self.results:
            return context.get_dummy_value()
        if len(self.results) == 1:
            return parts[0]
        return context.make_tuple(builder, signature.return_type, parts[: len(self.results)])


def device_function(function: Callable[..., Any]) -> Any:
    """Decorator: a device function inlined before type inference, so that its arguments may be functions."""
    return cuda.jit(device=True)(function) if SIMULATED else cuda.jit(device=True, inline="always")(function)


def large_device_function(function: Callable[..., Any]) -> Any:
    """Decorator: a device function typed by itself and inlined by LLVM.

    For large ones: numba takes minutes over a kernel into which it inlines thousands of statements itself.
    """
    return cuda.jit(device=True)(function) if SIMULATED else cuda.jit(device=True, forceinline=True)(function)


@contextmanager
def compiling_for(capability: tuple[int, int]) -> Iterator[None]:
    """Make numba-cuda compile device functions for this architecture without asking the driver for one."""
    from numba.cuda import dispatcher

    original = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
    try:
        yield
    finally:
        dispatcher.get_current_device = original


def kernel(threads: int, resident_ctas: int) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: a kernel of `threads` threads per CTA, compiled so that `resident_ctas` CTAs fit on an SM."""
    decorator: Callable[[Callable[..., Any]], Any] = (
        cuda.jit if SIMULATED else cuda.jit(launch_bounds=(threads, resident_ctas))
    )
    return decorator
