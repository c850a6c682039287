"""How an implementation rounds: the unit of each kind of value that it stores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from numba_atomflow.memory.view import View
from numba_atomflow.model.step import Attention, GateUp, Op, Qkv

# A value is rounded to within this, relatively: 2^-(mantissa bits + 1).
UNITS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "float64": 2.0**-53}
FLOAT32 = UNITS["float32"]
E4M3 = 2.0**-4


@dataclass(frozen=True)
class Precision:
    """Rounding units of one implementation; sums are float32 everywhere.

    Attributes:
        normed, q, k, v, attended, ffn: of what the stages store.
        probabilities: of softmax's weights, where they are multiplied with v.
        weights: of the weights, where they are not the checkpoint's own: 0 where they are.
        float32_angles: RoPE's angles are computed in float32 (as transformers does), not looked up in a table that was
            made in float64.
    """

    normed: float = FLOAT32
    q: float = FLOAT32
    k: float = FLOAT32
    v: float = FLOAT32
    probabilities: float = FLOAT32
    attended: float = FLOAT32
    ffn: float = FLOAT32
    weights: float = 0.0
    float32_angles: bool = False

    @classmethod
    def of_ops(cls, ops: Sequence[Op]) -> "Precision":
        """Read off the views of a step's ops; the last layer stands for all."""
        units: dict[str, Any] = {}

        def unit(*views: View | None) -> float:  # what is not written to memory stays float32
            return max(UNITS[np.dtype(view.dtype).name] if view is not None else FLOAT32 for view in views)

        for op in ops:
            match op:
                case Qkv():
                    units |= {"q": unit(op.qkv, op.q), "k": unit(op.qkv, op.keys), "v": unit(op.qkv, op.values)}
                case Attention():
                    # Tensor cores take both factors of their product with v in its type, which is the result's too.
                    units |= {"probabilities": unit(op.attn_out), "attended": unit(op.attn_out)}
                case GateUp():
                    units |= {"normed": unit(op.x_norm), "ffn": unit(op.y)}
        return cls(**units)
