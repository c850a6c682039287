"""Which number format each tensor of a model has: weights by the checkpoint's part, and the KV cache by the backend.

`ops/formats.py` describes the formats; a checkpoint's metadata names that of the LM head.
"""

from numba_atomflow.checkpoint.format import HeadFormat
from numba_atomflow.ops.formats import FP8_E4M3, FP16, KV_FLOAT16, KV_FLOAT32, WeightFormat

LINEAR_FORMAT = FP8_E4M3  # of every projection but the LM head
HEAD_FORMATS: dict[HeadFormat, WeightFormat] = {"fp8": FP8_E4M3, "fp16": FP16}  # of the LM head, by its option

GPU_KV = KV_FLOAT16
CPU_KV = KV_FLOAT32
