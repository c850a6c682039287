"""One step of the model as data: a list of named ops over views.

`build_step` makes the list for one token (decode) or a chunk of tokens (prefill). It is independent of any backend:
backends execute the list, and so do profilers, probes and byte counters. Each layer has five ops, and each op is small
enough for a single fused GPU kernel.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Self

from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.memory.kv_cache import NAME as KV_CACHE
from numba_atomflow.memory.kv_cache import layer_cache
from numba_atomflow.memory.view import View
from numba_atomflow.model.buffers import GATE_UP, PROJECTED
from numba_atomflow.model.rope_tables import table_of_layer


class Head(NamedTuple):
    """What a step computes after its last layer.

    Attributes:
        start, stop: the rows (tokens of the step) whose logits are computed, as in a slice: negative numbers count from
            the last row, and a `stop` of None is the end.
        sample: sample the next token from each of these rows.
    """

    start: int
    stop: int | None
    sample: bool = False

    def rows(self, tokens: int) -> range:
        """The rows of a step of `tokens` tokens."""
        return range(tokens)[self.start : self.stop]


ALL_LOGITS = Head(0, None)  # a step that verifies proposed tokens
NO_LOGITS = Head(0, 0)  # a prefill chunk that is not a prompt's last
LAST_LOGITS = Head(-1, None)
SAMPLE = Head(-1, None, sample=True)  # a prompt's last chunk, and a decode step


@dataclass(frozen=True, slots=True)
class Weight:
    """A projection's weight [out_features, in_features] = [N, K], in a layout of the backend's choice.

    Attributes:
        codes: the elements, FP8 codes or float16 (the LM head may be); in the checkpoint's layout, [N, K].
        scales: group scales [N, ceil(K / 128)]; None where they are interleaved with the codes, and for float16.
    """

    out_features: int
    in_features: int
    codes: View
    scales: View | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the weight reads."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's weights, by their names in the checkpoint: projections without ``.weight`` and ``.scale``, vectors."""

    projections: Mapping[str, Weight]
    norms: Mapping[str, View]
    biases: Mapping[str, View] = field(default_factory=dict)

    @classmethod
    def as_stored(cls, tensors: Mapping[str, View]) -> Self:
        """In the checkpoint's layout."""
        projections = {}
        for name, codes in tensors.items():
            if name.endswith(".weight"):
                part = name.removesuffix(".weight")
                out_features, in_features = codes.shape
                projections[part] = Weight(out_features, in_features, codes, tensors.get(f"{part}.scale"))
        norms = {name: view for name, view in tensors.items() if name.endswith("_norm")}
        return cls(projections, norms, {name: view for name, view in tensors.items() if name.endswith("_bias")})


@dataclass(frozen=True, eq=False)
class Op:
    """One op of the step. The fields of the subclasses name every tensor that it reads or writes.

    Two ops are never equal: the methods that compare them would cost every start of the program some 5 ms.

    Attributes:
        READS: fields with activations that the op reads (the KV cache and tables not counted).
        WRITES: fields with activations that it writes, in the order in which it makes them.
        WEIGHTS: fields with weights that it reads; None in those that the model does not have.
    """

    name: str

    READS: ClassVar[tuple[str, ...]] = ()
    WRITES: ClassVar[tuple[str, ...]] = ()
    WEIGHTS: ClassVar[tuple[str, ...]] = ()

    @property
    def kind(self) -> str:
        """Its name without the layer: "qkv" of ``layer.3.qkv``."""
        return self.name.rpartition(".")[2]

    @property
    def reads(self) -> tuple[View, ...]:
        """The activations that it reads."""
        return tuple(getattr(self, field) for field in self.READS)

    @property
    def writes(self) -> tuple[View, ...]:
        """The activations that it writes to memory."""
        return tuple(view for field in self.WRITES if (view := getattr(self, field)) is not None)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that the op must read."""
        weights = (getattr(self, field) for field in self.WEIGHTS)
        return sum(weight.nbytes for weight in weights if weight is not None)

    def cache_bytes(self, length: int) -> int:
        """Bytes of KV cache that the op must read when `length` positions are filled."""
        del length
        return 0

    def moved_bytes(self, length: int) -> int:
        """Compulsory traffic in bytes with `length` positions filled: weights, KV cache and activations, each once."""
        activations = sum(view.nbytes for view in (*self.reads, *self.writes))
        return self.weight_bytes + self.cache_bytes(length) + activations


@dataclass(frozen=True, eq=False)
class Embed(Op):
    """residual = embedding[tokens]."""

    tokens: View
    embedding: Weight
    residual: View

    READS = ("tokens",)
    WRITES = ("residual",)
    WEIGHTS = ("embedding",)

    @property
    def weight_bytes(self) -> int:
        """Only the rows of the tokens are read."""
        return self.embedding.nbytes * self.tokens.shape[0] // self.embedding.out_features


@dataclass(frozen=True, eq=False)
class Qkv(Op):
    """RMSNorm, projection to q, k and v, RoPE of q and k; appends k and v to the KV cache.

    Attributes:
        norm_weight: None in a model without this norm, whose x_norm is the residual stream itself.
        qkv: the projection's result before RoPE; None if it stays in registers.
        bias: float32 [N], added to the projection; None in a model without.
        q_norm, k_norm: float32 [head_dim], weights of an RMSNorm over each head of q and of k, after the bias and
            before the rotation; or [q_dim] and [kv_dim], of one over all heads; None in a model without.
    """

    residual: View
    position: View
    norm_weight: View | None
    weight: Weight
    cosines: View
    sines: View
    x_norm: View
    qkv: View | None
    q: View
    keys: View
    values: View
    bias: View | None = None
    q_norm: View | None = None
    k_norm: View | None = None

    READS = ("residual", "position")
    WRITES = ("x_norm", "qkv", "q")
    WEIGHTS = ("norm_weight", "weight", "bias", "q_norm", "k_norm")


@dataclass(frozen=True, eq=False)
class Attention(Op):
    """Grouped-query attention of q over the layer's KV cache.

    Attributes:
        window: positions that a token attends to, its own included; None: all.
        soft_cap: c where a score s becomes c tanh(s / c); None where it does not.
    """

    q: View
    position: View
    keys: View
    values: View
    attn_out: View
    window: int | None = None
    soft_cap: float | None = None

    READS = ("q", "position")
    WRITES = ("attn_out",)

    def cache_bytes(self, length: int) -> int:
        """Keys and values of `length` positions, or of the window."""
        return 2 * min(length, self.window or length) * self.keys.nbytes // self.keys.shape[0]


@dataclass(frozen=True, eq=False)
class ProjectAdd(Op):
    """residual += weight * x: the output projection of attention, and the MLP's down projection.

    Attributes:
        norm_weight: of an RMSNorm of what is added; None in a model without.
        projected: float32 [tokens, hidden], scratch for what is normed; None in a model without.
    """

    x: View
    weight: Weight
    residual: View
    norm_weight: View | None = None
    projected: View | None = None

    READS = ("x", "residual")
    WRITES = ("residual",)
    WEIGHTS = ("weight", "norm_weight")


@dataclass(frozen=True, eq=False)
class GateUp(Op):
    """RMSNorm, projection to gate and up, y = silu(gate) * up.

    Attributes:
        norm_weight: None in a model without this norm, whose x_norm is the residual stream itself.
        gate_up: float32 [tokens, 2 * ffn], scratch of a backend for the projection of a model with
            y = gelu(gate) * up; else None.
    """

    residual: View
    norm_weight: View | None
    weight: Weight
    x_norm: View
    y: View
    gate_up: View | None = None

    READS = ("residual",)
    WRITES = ("x_norm", "y")
    WEIGHTS = ("norm_weight", "weight")


@dataclass(frozen=True, eq=False)
class LmHead(Op):
    """Final RMSNorm of the rows that `Head` selects, and logits = weight * x_norm.

    Attributes:
        soft_cap: c where a logit x becomes c tanh(x / c); None where it does not.
    """

    residual: View
    norm_weight: View
    weight: Weight
    x_norm: View
    logits: View
    soft_cap: float | None = None

    READS = ("residual",)
    WRITES = ("x_norm", "logits")
    WEIGHTS = ("norm_weight", "weight")


@dataclass(frozen=True, eq=False)
class Sample(Op):
    """The next token of each row of logits, written to the input of the next step's embedding."""

    logits: View
    token: View

    READS = ("logits",)
    WRITES = ("token",)


@dataclass(frozen=True, eq=False)
class Advance(Op):
    """position += tokens: the step's last op, so that a captured step replays unchanged."""

    tokens: int
    position: View

    READS = ("position",)
    WRITES = ("position",)


def build_step(
    geometry: ModelGeometry, weights: Weights, buffers: Mapping[str, View], tokens: int, head: Head
) -> list[Op]:
    """The ops that run `tokens` tokens through the model, in order.

    Args:
        buffers: views of `step_buffers`, by name.
        tokens: tokens of this step; 1 for decode.
        head: the rows whose logits are computed, and whether the next token is sampled from each.

    Raises:
        IndexError: more tokens, or more rows of logits, than the buffers hold.
    """
    g = geometry

    def rows(name: str, width: int) -> View:
        return buffers[name].rows(0, tokens).columns(0, width)

    residual = rows("residual", g.hidden)
    x_norm = rows("x_norm", g.hidden) if g.pre_norm else residual
    projected, gate_up = (buffers[name].rows(0, tokens) if name in buffers else None for name in (PROJECTED, GATE_UP))
    q, attn_out, intermediate = rows("q", g.q_dim), rows("attn_out", g.q_dim), rows("intermediate", g.ffn)
    inputs, position = buffers["tokens"].rows(0, tokens), buffers["position"]
    ops: list[Op] = [Embed("embed", inputs, weights.projections["embedding"], residual)]
    for i in range(g.layers):
        layer = f"layer.{i}"
        keys, values = layer_cache(buffers[KV_CACHE], i)
        table, norms = table_of_layer(g, i), weights.norms
        ops += [
            Qkv(
                name=f"{layer}.qkv",
                residual=residual,
                position=position,
                norm_weight=norms.get(f"{layer}.attention_norm"),
                weight=weights.projections[f"{layer}.qkv"],
                cosines=buffers[f"{table}.cosines"],
                sines=buffers[f"{table}.sines"],
                x_norm=x_norm,
                qkv=buffers["qkv"].rows(0, tokens) if "qkv" in buffers else None,
                q=q,
                keys=keys,
                values=values,
                bias=weights.biases.get(f"{layer}.qkv_bias"),
                q_norm=norms.get(f"{layer}.q_norm"),
                k_norm=norms.get(f"{layer}.k_norm"),
            ),
            Attention(
                f"{layer}.attention",
                q,
                position,
                keys,
                values,
                attn_out,
                window=g.sliding_window if i in g.sliding_layers else None,
                soft_cap=g.attention_soft_cap,
            ),
            ProjectAdd(
                f"{layer}.o",
                attn_out,
                weights.projections[f"{layer}.o"],
                residual,
                norms.get(f"{layer}.post_attention_norm"),
                projected,
            ),
            GateUp(
                name=f"{layer}.gate_up",
                residual=residual,
                norm_weight=norms.get(f"{layer}.ffn_norm"),
                weight=weights.projections[f"{layer}.gate_up"],
                x_norm=x_norm,
                y=intermediate,
                gate_up=gate_up,
            ),
            ProjectAdd(
                f"{layer}.down",
                intermediate,
                weights.projections[f"{layer}.down"],
                residual,
                norms.get(f"{layer}.post_ffn_norm"),
                projected,
            ),
        ]
    return ops + build_tail(geometry, weights, buffers, tokens, head)


def build_tail(
    geometry: ModelGeometry, weights: Weights, buffers: Mapping[str, View], tokens: int, head: Head
) -> list[Op]:
    """The ops of a step that come after its layers; arguments are those of `build_step`."""
    ops: list[Op] = []
    head_rows = head.rows(tokens)
    if head_rows:
        ops.append(build_head(geometry, weights, buffers, head_rows.start, head_rows.stop))
    if head.sample:
        sampled = len(head_rows)
        ops.append(Sample("sample", buffers["logits"].rows(0, sampled), buffers["tokens"].rows(0, sampled)))
    ops.append(Advance("advance", tokens, buffers["position"]))
    return ops


def build_head(geometry: ModelGeometry, weights: Weights, buffers: Mapping[str, View], start: int, stop: int) -> LmHead:
    """Final norm and LM head for rows start .. stop - 1 of the residual stream; their logits are rows 0 .. of theirs.

    Raises:
        IndexError: more rows than the buffers hold.
    """
    return LmHead(
        name="lm_head",
        residual=buffers["residual"].rows(start, stop),
        norm_weight=weights.norms["final_norm"],
        weight=weights.projections["embedding" if geometry.tied_embeddings else "vocabulary"],
        x_norm=buffers["final_x_norm"].rows(0, stop - start).columns(0, geometry.hidden),
        logits=buffers["logits"].rows(0, stop - start),
        soft_cap=geometry.logit_soft_cap,
    )
