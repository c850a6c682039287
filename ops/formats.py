"""Number formats of weights and of the KV cache: the records that kernels and memory plans branch on.

A new format is a new record, its converter (GPU: `ops/cuda/layout/converters.py`; CPU: `ops/fp8.py`), and an entry in
`numba_atomflow/model/formats.py`, which says what tensor has which format.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightFormat:
    """How a weight matrix [out_features, in_features] is stored.

    Attributes:
        name: as options and metadata of checkpoints have it.
        element: name of an element's type.
        bits: of an element.
        group: weights along K that share a scale; 0: no scales.
        scale: dtype of a scale; "" without scales.
        converter: how GPU kernels make float16 of an element; "none": elements are float16.
    """

    name: str
    element: str
    bits: int
    group: int = 0
    scale: str = ""
    converter: str = "none"

    @property
    def scaled(self) -> bool:
        """Whether groups of weights have scales."""
        return self.group > 0

    def row_bytes(self, in_features: int) -> int:
        """Bytes of one row, scales included."""
        scales = -(-in_features // self.group) * 4 if self.scaled else 0
        return in_features * self.bits // 8 + scales


@dataclass(frozen=True)
class KvFormat:
    """How an element of the KV cache is stored.

    Attributes:
        dtype: NumPy's.
        converter: how attention kernels make float16 (GPU) or float32 (CPU) of it; "none": nothing to convert.
    """

    dtype: str
    converter: str = "none"


# W8A16: E4M3 codes, a float32 scale per 128 weights along K. "cvt" is an instruction of sm_89 and later; "bits" are
# integer instructions, for every architecture.
FP8_E4M3 = WeightFormat("fp8", "float8_e4m3fn", 8, group=128, scale="float32", converter="cvt")
FP8_E4M3_BITS = WeightFormat("fp8", "float8_e4m3fn", 8, group=128, scale="float32", converter="bits")
FP16 = WeightFormat("fp16", "float16", 16)

KV_FLOAT16 = KvFormat("float16")
KV_FLOAT32 = KvFormat("float32")
