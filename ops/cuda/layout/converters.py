"""How GPU kernels convert weights to float16, by the `converter` of a `WeightFormat`."""

from typing import Any, NamedTuple

from numba_atomflow.ops import ptx


class Converter(NamedTuple):
    """Conversion of a 32-bit word of weights to float16.

    Attributes:
        convert: device function: a word of 4 FP8 codes to two pairs of float16, weights (0, 1) and (2, 3) along K.
        byte_order: which of the 4 weights is in byte 0, 1, 2, 3 of a word.
        scale_factor: that the group's scale is multiplied by, because `convert` yields the value divided by it.
    """

    convert: Any
    byte_order: tuple[int, int, int, int]
    scale_factor: float


CONVERTERS = {
    "cvt": Converter(ptx.convert_fp8_cvt, (0, 1, 2, 3), 1.0),
    "bits": Converter(ptx.convert_fp8_bits, (2, 0, 3, 1), 256.0),  # yields the value times 2^-8
}
