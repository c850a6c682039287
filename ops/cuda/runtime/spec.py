"""A GPU kernel as data: its factory, the factory's arguments, and its launch configuration.

A spec can be pickled, compiled in another process, found in the cache on disk, and launched, without the compiled
function itself.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_type_hints

# Types of a kernel's arguments: one-dimensional arrays, by element type, and int64 numbers.
U8 = Annotated[Any, "uint8*"]
U16 = Annotated[Any, "uint16*"]
U32 = Annotated[Any, "uint32*"]
U64 = Annotated[Any, "uint64*"]
I32 = Annotated[Any, "int32*"]
I64 = Annotated[Any, "int64*"]
F32 = Annotated[Any, "float32*"]
F64 = Annotated[Any, "float64*"]
NUMBER = Annotated[Any, "int64"]


@dataclass(frozen=True)
class KernelSpec:
    """A kernel of `ops.cuda`.

    Attributes:
        name: as profilers show it; letters, digits and underscores.
        factory: a function of a module (specs are pickled); takes `arguments`, returns the kernel as numba has it.
        arguments: of the factory: plain values and frozen records, which their `repr` identifies.
        signature: a `typing.NamedTuple` class, which is the kernel's single parameter: its fields are annotated with
            U32, F32, NUMBER, ... A value of it is what a launch packs, what device code reads by name
            (`io.tokens`) and what tests fill by keyword; it compiles to the same parameters as one for each field.
        threads: per CTA. shared_bytes: dynamic shared memory per CTA.
        dependent: programmatic dependent launch: it may start before the previous kernel has ended.
        cooperative: its CTAs wait for each other, so that all must be resident at once; the driver refuses a grid that
            does not fit, which would deadlock.
        arch_specific: it has instructions that only this architecture has (wgmma and setmaxnreg on sm_90: compiled for
            sm_90a).
        whole_carveout: several CTAs are to be on an SM, because they wait for each other, or those of the next kernel
            start early: SMs give all memory that they can to shared memory. An SM keeps what it gave to a kernel as
            long as one of its CTAs runs.
    """

    name: str
    factory: Callable[..., Any]
    arguments: tuple[tuple[str, Any], ...]
    signature: type[tuple[Any, ...]]
    threads: int
    shared_bytes: int = 0
    dependent: bool = False
    cooperative: bool = False
    arch_specific: bool = False
    whole_carveout: bool = False

    def make(self) -> Any:
        """The kernel as numba has it."""
        return self.factory(**dict(self.arguments))

    @property
    def element_types(self) -> tuple[str, ...]:
        """Types of the kernel's arguments in order: "uint32*" is an array of uint32, "int64" a number."""
        return element_types(self.signature)

    def numba_signature(self) -> tuple[Any]:
        """Type of the kernel's parameter."""
        from numba.cuda import types

        fields = tuple(
            getattr(types, kind.removesuffix("*"))[::1] if kind.endswith("*") else getattr(types, kind)
            for kind in self.element_types
        )
        return (types.NamedTuple(fields, self.signature),)

    def digest(self) -> str:
        """Identifies the kernel among those of the same source: 16 hexadecimal digits."""
        factory = f"{self.factory.__module__}:{self.factory.__qualname__}"
        return hashlib.sha256(repr((factory, self.arguments, self.element_types)).encode()).hexdigest()[:16]


@cache
def element_types(signature: type[tuple[Any, ...]]) -> tuple[str, ...]:
    """`KernelSpec.element_types` of a signature."""
    return tuple(kind.__metadata__[0] for kind in get_type_hints(signature, include_extras=True).values())


@dataclass(frozen=True)
class Planned:
    """A kernel and its grid size in CTAs; 0 where each launch has its own."""

    spec: KernelSpec
    ctas: int


def kernel_spec(
    name: str,
    factory: Callable[..., Any],
    signature: type[tuple[Any, ...]],
    threads: int,
    shared_bytes: int = 0,
    **arguments: Any,
) -> KernelSpec:
    """A spec whose factory takes `arguments`; one of them, `dependent`, is also part of the launch configuration.

    For a cooperative kernel: `replace(kernel_spec(...), cooperative=True)`; `arch_specific` likewise.
    """
    dependent = bool(arguments.get("dependent", False))
    return KernelSpec(name, factory, tuple(sorted(arguments.items())), signature, threads, shared_bytes, dependent)
