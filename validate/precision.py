"""Precision of an implementation: the unit roundoff of each kind of stored value."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from numba_atomflow.memory.view import View
from numba_atomflow.model.step import Attention, GateUp, Op, Qkv

# Relative rounding error (unit roundoff): 2^-(mantissa bits + 1).
UNITS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "float64": 2.0**-53}
FLOAT32 = UNITS["float32"]
E4M3 = 2.0**-4


@dataclass(frozen=True)
class Precision:
    """Unit roundoffs of one implementation; sums are float32 everywhere.

    Attributes:
        x_norm, q, k, v, attn_out, intermediate: of the stored values of a layer.
        probabilities: of the softmax weights in the product with v.
        weights: of the weights; 0 if they are those of the checkpoint.
        float32_angles: RoPE angles are computed in float32 (as in transformers), not taken from a float64 table.
    """

    x_norm: float = FLOAT32
    q: float = FLOAT32
    k: float = FLOAT32
    v: float = FLOAT32
    probabilities: float = FLOAT32
    attn_out: float = FLOAT32
    intermediate: float = FLOAT32
    weights: float = 0.0
    float32_angles: bool = False

    @classmethod
    def of_ops(cls, ops: Sequence[Op]) -> "Precision":
        """The precision of a step's ops, from the dtypes of their views; all layers are alike."""
        units: dict[str, Any] = {}

        def unit(*views: View | None) -> float:  # values that are not stored stay float32
            return max(UNITS[np.dtype(view.dtype).name] if view is not None else FLOAT32 for view in views)

        for op in ops:
            match op:
                case Qkv():
                    units |= {"q": unit(op.qkv, op.q), "k": unit(op.qkv, op.keys), "v": unit(op.qkv, op.values)}
                case Attention():
                    # Tensor cores multiply probabilities and v in the dtype of v, which is that of the result.
                    units |= {"probabilities": unit(op.attn_out), "attn_out": unit(op.attn_out)}
                case GateUp():
                    units |= {"x_norm": unit(op.x_norm), "intermediate": unit(op.y)}
        return cls(**units)
