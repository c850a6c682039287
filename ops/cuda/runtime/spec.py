"""A GPU kernel as data: which factory makes it, from what, and how it is called.

A spec can be compiled here or in another process, found again in a cache on disk, and launched, all without the
function itself.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# One-dimensional arrays, by element type; "int64" without a star is a number.
U8, U16, U32, U64 = "uint8*", "uint16*", "uint32*", "uint64*"
I32, I64, F32, F64, NUMBER = "int32*", "int64*", "float32*", "float64*", "int64"


@dataclass(frozen=True)
class KernelSpec:
    """A kernel of `ops.cuda`.

    Attributes:
        name: as profilers show it; letters, digits and underscores.
        factory: a function of a module (specs are pickled); takes `arguments`, returns the kernel as numba has it.
        arguments: of the factory: plain values and shapes, whose `repr` tells them apart.
        signature: of the kernel: types of its arguments.
        threads: per block. shared_bytes: dynamic shared memory.
        dependent: it may be launched before the kernel before it has ended (programmatic dependent launch).
        cooperative: its blocks wait for each other, so that all must be resident at once; the driver refuses a grid
            that does not fit, which would wait for ever.
    """

    name: str
    factory: Callable[..., Any]
    arguments: tuple[tuple[str, Any], ...]
    signature: tuple[str, ...]
    threads: int
    shared_bytes: int = 0
    dependent: bool = False
    cooperative: bool = False

    def make(self) -> Any:
        """The kernel as numba has it."""
        return self.factory(**dict(self.arguments))

    def numba_signature(self) -> tuple[Any, ...]:
        """Types of the kernel's arguments."""
        from numba.cuda import types

        return tuple(
            getattr(types, kind.removesuffix("*"))[::1] if kind.endswith("*") else getattr(types, kind)
            for kind in self.signature
        )

    def digest(self) -> str:
        """Tells this kernel from others made by the same source: 16 hexadecimal digits."""
        factory = f"{self.factory.__module__}:{self.factory.__qualname__}"
        return hashlib.sha256(repr((factory, self.arguments, self.signature)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Planned:
    """A kernel and the number of blocks that it is launched with; 0 where that is decided at each launch."""

    spec: KernelSpec
    blocks: int


def kernel_spec(
    name: str,
    factory: Callable[..., Any],
    signature: tuple[str, ...],
    threads: int,
    shared_bytes: int = 0,
    **arguments: Any,
) -> KernelSpec:
    """A spec whose factory takes `arguments`; one of them, `dependent`, also says how it is launched.

    A cooperative one is `replace(kernel_spec(...), cooperative=True)`: its factory need not know.
    """
    dependent = bool(arguments.get("dependent", False))
    return KernelSpec(name, factory, tuple(sorted(arguments.items())), signature, threads, shared_bytes, dependent)
