"""Vectors of LLVM's portable IR, and sums over their lanes, for the kernels whose bits depend on no width.

VECTOR lanes, whatever the processor has: LLVM splits them. So the order of sums is the same everywhere.
"""

from collections.abc import Sequence

from llvmlite import ir

from numba_atomflow.ops.simd_softmax import PLAIN

VECTOR = 16  # lanes of operands
WIDTH = 8  # lanes of results: most columns of a step
_I32, _F32 = ir.IntType(32), ir.FloatType()
FLOATS, RESULTS = ir.VectorType(_F32, VECTOR), ir.VectorType(_F32, WIDTH)


def sums_of_lanes(b: ir.IRBuilder, vectors: Sequence[ir.Value]) -> ir.Value:
    """The sum of the lanes of each of up to 8 vectors, as a tree over neighbours: one vector of the sums."""
    sums = [
        b.fadd(shuffle(b, vector, vector, range(8)), shuffle(b, vector, vector, range(8, 16)), flags=PLAIN)
        for vector in vectors
    ]
    sums += [splat_of(0.0, RESULTS)] * (WIDTH - len(vectors))
    for even in ([0, 8, 2, 10, 4, 12, 6, 14], [0, 1, 8, 9, 4, 5, 12, 13], [0, 1, 2, 3, 8, 9, 10, 11]):
        distance = WIDTH // len(sums)
        odd = [i + distance for i in even]
        sums = [
            b.fadd(shuffle(b, first, second, even), shuffle(b, first, second, odd), flags=PLAIN)
            for first, second in zip(sums[::2], sums[1::2], strict=True)
        ]
    return sums[0]


def shuffle(b: ir.IRBuilder, first: ir.Value, second: ir.Value, order: Sequence[int]) -> ir.Value:
    """The lanes of two vectors, in this order."""
    return b.shuffle_vector(first, second, ir.Constant(ir.VectorType(_I32, len(order)), list(order)))


def splat(b: ir.IRBuilder, scalar: ir.Value, vector: ir.VectorType) -> ir.Value:
    """A scalar in every lane of a vector."""
    lane_0 = b.insert_element(ir.Constant(vector, ir.Undefined), scalar, _I32(0))
    return shuffle(b, lane_0, lane_0, [0] * vector.count)


def splat_of(value: float, kind: ir.Type) -> ir.Constant:
    """A constant of this type, in every lane of a vector."""
    return ir.Constant(kind, [value] * kind.count) if isinstance(kind, ir.VectorType) else ir.Constant(kind, value)
