"""Explicit SIMD for prompts: the inner loops of a matrix product, over panels of columns.

A panel is a float32 matrix [K, COLUMNS]: as many columns as fill VECTORS vectors. `multiply_rows` and
`multiply_columns` compute c = a b for a panel b: ROWS rows of c stay in registers, and each step along K multiplies
VECTORS vectors of b by ROWS broadcast elements of a. ops/simd_panel.py makes panels of a weight's rows.

Each element of c is one chain of multiply-adds in order of K, whatever else is computed beside it: its bits do not
depend on the number of rows.

Cost model: 2 * ROWS * VECTORS operations per ROWS + VECTORS loads. With AVX-512 that is 12 rows by 32 columns, 24 of 32
registers; with AVX2 6 by 16, 12 of 16. Source: Goto and van de Geijn, "Anatomy of High-Performance Matrix
Multiplication" (2008).
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, codegen, config, types
from numba.extending import intrinsic


def _lanes_and_rows() -> tuple[int, int]:
    """Floats per vector, and rows per step, for the processor that numba compiles for."""
    features = codegen.get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    has = features.split(",")
    if "+avx512f" in has:
        return 16, 12
    if "+avx" in has:
        return 8, 6
    return 4, 12 if "+neon" in has else 6


VECTORS = 2
LANES, ROWS = _lanes_and_rows()
COLUMNS = VECTORS * LANES  # of a panel
ROW_STEP = ROWS // 3  # rows are computed in multiples of this
_UNROLL = 4  # steps along K

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
FLOATS, WORDS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
FUSE = ("contract",)  # a multiply and an add may become one FMA
_INDEX = types.int64


def floats(value: float) -> ir.Constant:
    """A vector of equal floats."""
    return ir.Constant(FLOATS, [value] * LANES)


def words(value: int) -> ir.Constant:
    """A vector of equal 32-bit integers."""
    return ir.Constant(WORDS, [value] * LANES)


def splat(b: ir.IRBuilder, scalar: ir.Value, vector: ir.VectorType) -> ir.Value:
    """A scalar in every lane of a vector."""
    lane_0 = b.insert_element(ir.Constant(vector, ir.Undefined), scalar, _I32(0))
    return b.shuffle_vector(lane_0, ir.Constant(vector, ir.Undefined), words(0))


def multiply_add(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value, fuse: tuple[str, ...] = FUSE) -> ir.Value:
    """X * y + z."""
    return b.fadd(z, b.fmul(x, y, flags=fuse), flags=fuse)


def load(b: ir.IRBuilder, data: ir.Value, index: ir.Value) -> ir.Value:
    """The vector at data[index : index + LANES]."""
    return b.load(b.bitcast(b.gep(data, [index]), FLOATS.as_pointer()), align=4)


def store(b: ir.IRBuilder, vector: ir.Value, data: ir.Value, index: ir.Value) -> None:
    """data[index : index + LANES] = vector."""
    b.store(vector, b.bitcast(b.gep(data, [index]), FLOATS.as_pointer()), align=4)


def data_of(context: Any, builder: ir.IRBuilder, array: Any, value: ir.Value) -> ir.Value:
    """Pointer to an array's first element."""
    return context.make_array(array)(context, builder, value).data


@intrinsic
def multiply_rows(typing_context, a, a_start, a_stride, rows, b, b_start, b_stride, count, c, c_start, c_stride, add):
    """c[r, j] = sum over k of a[r, k] * b[k, j], or += the sum: r < rows, j < COLUMNS, k < count.

    Element a[r, k] is at a_start + r * a_stride + k of the array, b[k, j] at b_start + k * b_stride + j, and c[r, j] at
    c_start + r * c_stride + j. All are float32 and C-contiguous.

    Args:
        rows: at least 1. Rows of c up to the next multiple of ROW_STEP are written.
        add: whether to add to c.
    """
    del typing_context, a_start, a_stride, rows, b_start, b_stride, count, c_start, c_stride, add
    signature = types.void(a, _INDEX, _INDEX, _INDEX, b, _INDEX, _INDEX, _INDEX, c, _INDEX, _INDEX, types.boolean)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        product = _Product(context, builder, signature, args)
        last = builder.sub(product.rows, _I64(1))

        def elements(first: ir.Value, rows: int) -> "_Elements":
            """Rows behind the last are the last again, so that nothing behind the array is read."""
            pointers = []
            for r in range(rows):
                row = builder.add(first, _I64(r))
                row = builder.select(builder.icmp_signed("<", row, last), row, last)
                pointers.append(builder.gep(product.a, [builder.mul(row, product.a_stride)]))
            return lambda r, k: builder.gep(pointers[r], [k])

        return product.emit(elements)

    return signature, codegen


@intrinsic
def multiply_columns(
    typing_context, a, a_start, a_stride, rows, b, b_start, b_stride, count, c, c_start, c_stride, add
):
    """The same with a transposed: element a[r, k] is at a_start + k * a_stride + r.

    Args:
        rows: a multiple of ROW_STEP.
    """
    del typing_context, a_start, a_stride, rows, b_start, b_stride, count, c_start, c_stride, add
    signature = types.void(a, _INDEX, _INDEX, _INDEX, b, _INDEX, _INDEX, _INDEX, c, _INDEX, _INDEX, types.boolean)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        product = _Product(context, builder, signature, args)

        def elements(first: ir.Value, rows: int) -> "_Elements":
            del rows
            base = builder.gep(product.a, [first])
            return lambda r, k: builder.gep(builder.gep(base, [builder.mul(k, product.a_stride)]), [_I64(r)])

        return product.emit(elements)

    return signature, codegen


_Elements = Callable[[int, ir.Value], ir.Value]  # pointer to a[r, k] of a block of rows


class _Product:
    """Emits the loops over blocks of rows and along K."""

    def __init__(self, context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> None:
        _, a_start, self.a_stride, self.rows, _, b_start, self.b_stride, self.count, _, c_start, self.c_stride, add = (
            args
        )
        self.context, self.builder = context, builder
        self.a, self.b, self.c = (
            builder.gep(data_of(context, builder, signature.args[i], args[i]), [start])
            for i, start in ((0, a_start), (4, b_start), (8, c_start))
        )
        self.add = builder.icmp_unsigned("!=", add, add.type(0))

    def emit(self, elements: Callable[[ir.Value, int], _Elements]) -> ir.Value:
        """Whole blocks of ROWS rows, then one of as many steps as are left."""
        b = self.builder
        blocks = b.sdiv(b.add(self.rows, _I64(ROWS - 1)), _I64(ROWS))
        with cgutils.for_range(b, blocks, intp=_I64) as loop:
            first = b.mul(loop.index, _I64(ROWS))
            left = b.sub(self.rows, first)
            with b.if_else(b.icmp_signed(">", left, _I64(2 * ROW_STEP))) as (whole, part):
                with whole:
                    self._block(first, 3 * ROW_STEP, elements)
                with part, b.if_else(b.icmp_signed(">", left, _I64(ROW_STEP))) as (two, one):
                    with two:
                        self._block(first, 2 * ROW_STEP, elements)
                    with one:
                        self._block(first, ROW_STEP, elements)
        return self.context.get_dummy_value()

    def _block(self, first: ir.Value, rows: int, elements: Callable[[ir.Value, int], _Elements]) -> None:
        """Rows first .. first + rows - 1 of c."""
        b, at = self.builder, elements(first, rows)
        places = [
            b.add(b.mul(b.add(first, _I64(r)), self.c_stride), _I64(v * LANES))
            for r in range(rows)
            for v in range(VECTORS)
        ]
        sums = [cgutils.alloca_once(b, FLOATS) for _ in places]
        for place, total in zip(places, sums, strict=True):
            b.store(floats(0.0), total)
            with b.if_then(self.add):
                b.store(load(b, self.c, place), total)
        steps = b.sdiv(self.count, _I64(_UNROLL))
        with cgutils.for_range(b, steps, intp=_I64) as loop:
            k = b.mul(loop.index, _I64(_UNROLL))
            for i in range(_UNROLL):
                self._step(b.add(k, _I64(i)), at, sums)
        done = b.mul(steps, _I64(_UNROLL))
        with cgutils.for_range(b, b.sub(self.count, done), intp=_I64) as loop:
            self._step(b.add(done, loop.index), at, sums)
        for place, total in zip(places, sums, strict=True):
            store(b, b.load(total), self.c, place)

    def _step(self, k: ir.Value, at: _Elements, sums: Sequence[ir.Value]) -> None:
        """Add a[r, k] * b[k, :] to each row's sums."""
        b = self.builder
        row = b.mul(k, self.b_stride)
        vectors = [load(b, self.b, b.add(row, _I64(v * LANES))) for v in range(VECTORS)]
        for r in range(len(sums) // VECTORS):
            x = splat(b, b.load(at(r, k), align=4), FLOATS)
            for v, vector in enumerate(vectors):
                total = sums[r * VECTORS + v]
                b.store(multiply_add(b, x, vector, b.load(total)), total)
