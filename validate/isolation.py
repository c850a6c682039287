"""Which views of an op take the reference's values before it runs, so that errors end there."""

from typing import Literal

from numba_atomflow.memory.view import View
from numba_atomflow.model.step import Attention, GateUp, LmHead, Op, ProjectAdd, Qkv

Isolation = Literal["none", "layers", "ops"]  # what is fed the reference's inputs: each layer, or each op


def layer_input(layer: int) -> str:
    """The probe of a layer's input; of the final norm's if `layer` is the number of layers."""
    return f"layer.{layer - 1}.output" if layer else "embedding"


def fed_views(op: Op, layers: int, isolation: Isolation) -> list[tuple[View, str]]:
    """The views of an op to write, each with the probe whose values it takes. Views of the KV cache are whole.

    Args:
        op: of a step. layers: of the model.
    """
    if isolation == "none":
        return []
    if isinstance(op, LmHead):
        return [(op.residual, layer_input(layers))]
    if not op.name.startswith("layer."):
        return []
    layer = int(op.name.split(".")[1])
    if isinstance(op, Qkv):
        return [(op.residual, layer_input(layer))]
    if isolation == "layers":
        return []
    prefix = f"layer.{layer}."
    match op:
        case Attention():
            return [(op.q, prefix + "q"), (op.keys, prefix + "k"), (op.values, prefix + "v")]
        case ProjectAdd() if op.kind == "o":
            return [(op.x, prefix + "attention"), (op.residual, layer_input(layer))]
        case ProjectAdd():
            return [(op.x, prefix + "ffn"), (op.residual, prefix + "after_attention")]
        case GateUp():
            return [(op.residual, prefix + "after_attention")]
    raise NotImplementedError(f"the inputs of {op.name} are no probes")
