"""Named activations of a step: what `capture`, `edit` and the validator read and write, by one table of names.

docs/research.md says what each one is.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from numba_atomflow.errors import OptionError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.geometry import ModelGeometry


@dataclass(frozen=True, slots=True)
class Activation:
    """One of them.

    Attributes:
        name: in the table.
        op: name of the op that computes it.
        field: the op's view of it.
        width: values per position.
        layer: its index, or None outside of layers.
        instead: what to edit in its place; "" if it can be edited. Norms and their projections are one op, which has
            used the norm's result when an observer sees it; `mlp` is a difference of two states of the stream.
    """

    name: str
    op: str
    field: str
    width: int
    layer: int | None
    instead: str = ""

    @property
    def kind(self) -> str:
        """The name without the layer: "output" of ``layer.3.output``."""
        return self.name.rpartition(".")[2]

    @property
    def is_cached(self) -> bool:
        """Whether it is a part of the KV cache, of which a step writes only its own positions."""
        return self.field in ("keys", "values")

    @property
    def is_difference(self) -> bool:
        """Whether it is what the op adds to its view, not what the view holds afterwards."""
        return self.kind == "mlp"

    @property
    def in_head(self) -> bool:
        """Whether it is computed only for positions whose logits are."""
        return self.op == "lm_head"


def activations(geometry: ModelGeometry) -> list[Activation]:
    """All of a model, in the order in which a step computes them."""
    g = geometry
    found = [Activation("embedding", "embed", "residual", g.hidden, None)]
    for i in range(g.layers):
        layer = f"layer.{i}."
        stream = f"layer.{i - 1}.output" if i else "embedding"
        for name, op, field, width, instead in (
            *((("input_norm", "qkv", "x_norm", g.hidden, stream),) if g.pre_norm else ()),
            ("q", "qkv", "q", g.q_dim, ""),
            ("k", "qkv", "keys", g.kv_dim, ""),
            ("v", "qkv", "values", g.kv_dim, ""),
            ("attention", "attention", "attn_out", g.q_dim, ""),
            ("after_attention", "o", "residual", g.hidden, ""),
            *((("ffn_norm", "gate_up", "x_norm", g.hidden, f"{layer}after_attention"),) if g.pre_norm else ()),
            ("ffn", "gate_up", "y", g.ffn, ""),
            ("mlp", "down", "residual", g.hidden, f"{layer}ffn"),
            ("output", "down", "residual", g.hidden, ""),
        ):
            found.append(Activation(layer + name, layer + op, field, width, i, instead))
    last = f"layer.{g.layers - 1}.output" if g.layers else "embedding"
    found.append(Activation("final_norm", "lm_head", "x_norm", g.hidden, None, last))
    found.append(Activation("logits", "lm_head", "logits", g.vocabulary, None))
    return found


def select(patterns: str | Iterable[str], geometry: ModelGeometry) -> list[Activation]:
    """The activations with these names, in the order of a step.

    Args:
        patterns: names, or globs: ``*`` any characters, ``?`` one, ``[0-4]`` one of several.
        geometry: of the model.

    Raises:
        OptionError: one is no text, or names nothing; the message has the nearest names.
    """
    every = activations(geometry)
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else _texts(patterns):
        named = [activation.name for activation in every if fnmatchcase(activation.name, pattern)]
        if not named:
            raise OptionError(_unknown(pattern, [activation.name for activation in every], geometry))
        chosen.update(named)
    if not chosen:
        raise OptionError("No activation is named; give at least one, such as layer.0.output.")
    return [activation for activation in every if activation.name in chosen]


def _texts(patterns: Iterable[str]) -> list[str]:
    message = f"Activations are a list of names, such as ['layer.*.output'], not {quote(patterns)}."
    if not isinstance(patterns, Iterable):
        raise OptionError(message)
    texts = list(patterns)
    if not all(isinstance(text, str) for text in texts):
        raise OptionError(message)
    return texts


def _unknown(pattern: str, names: list[str], geometry: ModelGeometry) -> str:
    nearest = get_close_matches(pattern, names, n=3) or ["embedding", "layer.0.output", "logits"]
    return (
        f"There is no activation {quote(pattern)} in this model with layers 0 to {geometry.layers - 1}; "
        f"the nearest names are {', '.join(nearest)}."
    )
