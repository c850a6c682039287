"""Which number format each tensor of a model has: weights by the checkpoint's part, and the KV cache by the backend.

`ops/formats.py` describes the formats.
"""

from typing import Literal

from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.ops.formats import FP8_E4M3, FP16, KV_FLOAT16, KV_FLOAT32, WeightFormat

HeadFormat = Literal["fp8", "fp16"]  # of the LM head, as options and metadata have it

HEAD_FORMATS: dict[HeadFormat, WeightFormat] = {"fp8": FP8_E4M3, "fp16": FP16}
LINEAR_FORMAT = FP8_E4M3  # of every other matrix

GPU_KV, CPU_KV = KV_FLOAT16, KV_FLOAT32


def head_part(geometry: ModelGeometry) -> str:
    """The part of a checkpoint that holds the LM head."""
    return "embedding" if geometry.tied_embeddings else "vocabulary"


def matrix_format(geometry: ModelGeometry, part: str, head: HeadFormat) -> WeightFormat:
    """The format of a part of a checkpoint that is a matrix.

    Args:
        head: of the LM head.
    """
    return HEAD_FORMATS[head] if part == head_part(geometry) else LINEAR_FORMAT
