"""A small model, of `persistent_cases.py`, divided among ranks: each has its rows of it."""

from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
from persistent_cases import Model, PersistentCase

from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.sharding import Sharding
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout, prepack_reference, unpack_reference
from numba_atomflow.ops.cuda.persistent.schedule import PersistentShape, RankShape

PART_OF = {"qkv": "layer.0.qkv", "o": "layer.0.o", "gate_up": "layer.0.gate_up", "down": "layer.0.down"}


@dataclass(frozen=True)
class RankCase(PersistentCase):
    """A rank's part of the model of `whole`; its own sizes are the rank's."""

    whole: PersistentCase | None = None
    ranks: int = 2

    @classmethod
    def of(cls, whole: PersistentCase, ranks: int) -> "RankCase":
        own = {"heads": whole.heads // ranks, "kv_heads": whole.kv_heads // ranks, "ffn": whole.ffn // ranks}
        sizes = {field.name: getattr(whole, field.name) for field in fields(whole)}
        return cls(**(sizes | own | {"sms": whole.sms // ranks}), whole=whole, ranks=ranks)

    @property
    def model(self) -> PersistentCase:
        assert self.whole is not None
        return self.whole

    @property
    def sharding(self) -> Sharding:
        w = self.model
        sizes = (w.layers, w.hidden, w.heads, w.kv_heads, w.head_dim, w.ffn, w.vocabulary)
        return Sharding(ModelGeometry(*sizes, max_positions=512, tied_embeddings=True), self.ranks)

    def layout(self, kind: str) -> PrepackedLayout:
        whole, sharding = self.model.layout(kind), self.sharding
        rows = {"qkv": self.q_dim + 2 * self.kv_dim, "gate_up": 2 * self.ffn, "lm_head": sharding.vocabulary_rows}
        half = self.ffn if kind == "gate_up" else whole.half
        return replace(whole, out_features=rows.get(kind, sharding.hidden_rows), half=half)

    @cached_property
    def shape(self) -> PersistentShape:
        return self.part_of(self.model.shape)

    def part_of(self, whole: PersistentShape) -> PersistentShape:
        """A rank's part of a shape of the whole model."""
        names = ("qkv", "o", "gate_up", "down", "lm_head")
        return replace(
            whole,
            **{name: self.layout(name) for name in names},
            embedding=self.layout("lm_head"),
            heads=self.heads,
            kv_heads=self.kv_heads,
            intermediate=self.ffn,
            sms=self.sms,
            rank=RankShape(self.ranks, self.model.sms, self.model.vocabulary),
        )


def part_of(whole: Model, case: RankCase, rank: int) -> Model:
    """A rank's rows of the weights, prepacked by themselves."""
    part = Model(case)
    words = dict(zip(_names(whole), whole.words[::2], strict=True))

    def add(name: str, kind: str) -> None:
        codes, scales = unpack_reference(words[name], case.model.layout(kind))
        rows = case.sharding.rows(PART_OF.get(kind, "embedding"), rank)
        own_codes, own_scales = (np.concatenate([array[span] for span in rows]) for array in (codes, scales))
        missing = case.layout(kind).out_features - len(own_codes)  # of the last rank's part of the vocabulary
        own_codes, own_scales = (np.pad(array, ((0, missing), (0, 0))) for array in (own_codes, own_scales))
        part._place(name, prepack_reference(own_codes, own_scales, case.layout(kind)))

    add("embedding", "lm_head")
    for layer in range(case.layers):
        for kind in ("qkv", "o", "gate_up", "down"):
            add(f"{layer}.{kind}", kind)
    for name, values in whole.norms.items():
        if name.endswith("bias"):
            values = np.concatenate([values[span] for span in case.sharding.rows(PART_OF["qkv"], rank)])
        part._place(f"{name}_norm", values.view(np.uint32))
    return part


def _names(model: Model) -> list[str]:
    """Of the model's matrices and norms, in the order of their words."""
    return sorted(model.places, key=model.places.__getitem__)
