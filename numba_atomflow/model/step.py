"""The decode step as data: a list of named ops over views.

`build_step` makes the list for one token (decode) or a block of tokens (prefill). It knows no backend: a backend walks
the list, and so do profilers, probes and byte counters. Five ops per layer, each one a stage that a GPU can run as a
single fused kernel.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.memory.kv_cache import NAME as KV_CACHE
from numba_atomflow.memory.kv_cache import kv_cache_buffer, layer_cache
from numba_atomflow.memory.plan import Buffer
from numba_atomflow.memory.view import View

Head = Literal["none", "logits", "sample"]


@dataclass(frozen=True, slots=True)
class Weight:
    """A projection's weight [rows, columns] = [N, K], in whatever order a backend keeps it.

    Attributes:
        codes: the elements; in the checkpoint's order [N, K]. FP8 codes, or float16 (the vocabulary projection may be).
        scales: group scales [N, ceil(K / 128)]; None where they lie among the codes, and for float16.
    """

    rows: int
    columns: int
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
        """In the checkpoint's own order."""
        projections = {}
        for name, codes in tensors.items():
            if name.endswith(".weight"):
                part = name.removesuffix(".weight")
                rows, columns = codes.shape
                projections[part] = Weight(rows, columns, codes, tensors.get(f"{part}.scale"))
        norms = {name: view for name, view in tensors.items() if name.endswith("_norm")}
        return cls(projections, norms, {name: view for name, view in tensors.items() if name.endswith("_bias")})


@dataclass(frozen=True, eq=False)
class Op:
    """One stage of the step. The fields of its subclasses name every tensor that it touches.

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
        """Bytes that the op must at least move when `length` positions are filled: weights, cache and activations."""
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
        return self.embedding.nbytes * self.tokens.shape[0] // self.embedding.rows


@dataclass(frozen=True, eq=False)
class Qkv(Op):
    """Norm, project to q, k and v, rotate q and k, append k and v to the cache.

    Attributes:
        qkv: what the projection makes, before rotation; None where it never leaves the registers.
        bias: float32 [N], added to the projection; None in a model without.
        q_norm, k_norm: float32 [head_dim], weights of an RMSNorm over each head of q and of k, after the bias and
            before the rotation; None in a model without.
    """

    residual: View
    position: View
    norm: View
    weight: Weight
    cosines: View
    sines: View
    normed: View
    qkv: View | None
    q: View
    keys: View
    values: View
    bias: View | None = None
    q_norm: View | None = None
    k_norm: View | None = None

    READS = ("residual", "position")
    WRITES = ("normed", "qkv", "q")
    WEIGHTS = ("norm", "weight", "bias", "q_norm", "k_norm")


@dataclass(frozen=True, eq=False)
class Attention(Op):
    """Grouped-query attention of q over the layer's cache."""

    q: View
    position: View
    keys: View
    values: View
    attended: View

    READS = ("q", "position")
    WRITES = ("attended",)

    def cache_bytes(self, length: int) -> int:
        """Keys and values of `length` positions."""
        return 2 * length * self.keys.nbytes // self.keys.shape[0]


@dataclass(frozen=True, eq=False)
class ProjectAdd(Op):
    """residual += weight * x: the output projection of attention, and the MLP's down projection."""

    x: View
    weight: Weight
    residual: View

    READS = ("x", "residual")
    WRITES = ("residual",)
    WEIGHTS = ("weight",)


@dataclass(frozen=True, eq=False)
class GateUp(Op):
    """Norm, project to gate and up, y = silu(gate) * up."""

    residual: View
    norm: View
    weight: Weight
    normed: View
    y: View

    READS = ("residual",)
    WRITES = ("normed", "y")
    WEIGHTS = ("norm", "weight")


@dataclass(frozen=True, eq=False)
class Vocabulary(Op):
    """Final norm of the rows whose logits are wanted, and logits = weight * normed."""

    residual: View
    norm: View
    weight: Weight
    normed: View
    logits: View

    READS = ("residual",)
    WRITES = ("normed", "logits")
    WEIGHTS = ("norm", "weight")


@dataclass(frozen=True, eq=False)
class Sample(Op):
    """Choose the next token from the logits, and put it where the next step's embedding looks."""

    logits: View
    token: View

    READS = ("logits",)
    WRITES = ("token",)


@dataclass(frozen=True, eq=False)
class Advance(Op):
    """position += tokens: the step's last op, so that nothing outside has to patch the next one."""

    tokens: int
    position: View

    READS = ("position",)
    WRITES = ("position",)


@dataclass(frozen=True, slots=True)
class StepSizes:
    """How large a backend's buffers are, and of what type.

    Attributes:
        max_seq_len: positions that may be used.
        block: most tokens that a prefill step takes at once.
        head_rows: most positions whose logits are computed at once.
        activation: element type of what projections and attention read.
        cache: element type of the KV cache.
        multiple: widths of what projections read are padded to a multiple of this.
        spare: positions behind the last, which a step of fixed width may write to and nothing reads.
        keep_qkv: whether q, k and v are written to memory before they are rotated.
    """

    max_seq_len: int
    block: int
    head_rows: int
    activation: str = "float32"
    cache: str = "float32"
    multiple: int = 1
    spare: int = 0
    keep_qkv: bool = True


def step_buffers(geometry: ModelGeometry, sizes: StepSizes) -> list[Buffer]:
    """Every buffer of a step except weights and a backend's own scratch."""
    g, block = geometry, sizes.block
    positions = sizes.max_seq_len + sizes.spare

    def padded(width: int) -> int:
        return -(-width // sizes.multiple) * sizes.multiple

    def activation(name: str, *shape: int, dtype: str = "float32") -> Buffer:
        return Buffer("activations", name, shape, dtype)

    buffers = [
        kv_cache_buffer(g.layers, positions, g.kv_dim, sizes.cache),
        activation("tokens", block, dtype="int32"),
        activation("position", 1, dtype="int64"),
        activation("residual", block, g.hidden),
        activation("normed", block, padded(g.hidden), dtype=sizes.activation),
        activation("q", block, g.q_dim, dtype=sizes.activation),
        activation("attended", block, padded(g.q_dim), dtype=sizes.activation),
        activation("ffn", block, padded(g.ffn), dtype=sizes.activation),
        activation("final_normed", sizes.head_rows, padded(g.hidden), dtype=sizes.activation),
        activation("logits", sizes.head_rows, g.vocabulary),
        Buffer("workspace", "rope.cosines", (positions, g.head_dim // 2), "float32"),
        Buffer("workspace", "rope.sines", (positions, g.head_dim // 2), "float32"),
    ]
    if sizes.keep_qkv:
        buffers.append(activation("qkv", block, g.q_dim + 2 * g.kv_dim))
    return buffers


def build_step(
    geometry: ModelGeometry, weights: Weights, buffers: Mapping[str, View], tokens: int, head: Head
) -> list[Op]:
    """The ops that take `tokens` tokens through the model, in order.

    Args:
        buffers: views of `step_buffers`, by name.
        tokens: tokens of this step; 1 for decode.
        head: "none" (a prompt block that is not the last), "logits" of the last token, or "sample" from them as well.
    """
    g = geometry

    def rows(name: str, width: int) -> View:
        return buffers[name].rows(0, tokens).columns(0, width)

    residual, normed = rows("residual", g.hidden), rows("normed", g.hidden)
    q, attended, ffn = rows("q", g.q_dim), rows("attended", g.q_dim), rows("ffn", g.ffn)
    inputs, position = buffers["tokens"].rows(0, tokens), buffers["position"]
    ops: list[Op] = [Embed("embed", inputs, weights.projections["embedding"], residual)]
    for i in range(g.layers):
        layer = f"layer.{i}"
        keys, values = layer_cache(buffers[KV_CACHE], i)
        ops += [
            Qkv(
                name=f"{layer}.qkv",
                residual=residual,
                position=position,
                norm=weights.norms[f"{layer}.attention_norm"],
                weight=weights.projections[f"{layer}.qkv"],
                cosines=buffers["rope.cosines"],
                sines=buffers["rope.sines"],
                normed=normed,
                qkv=buffers["qkv"].rows(0, tokens) if "qkv" in buffers else None,
                q=q,
                keys=keys,
                values=values,
                bias=weights.biases.get(f"{layer}.qkv_bias"),
                q_norm=weights.norms.get(f"{layer}.q_norm"),
                k_norm=weights.norms.get(f"{layer}.k_norm"),
            ),
            Attention(f"{layer}.attention", q, position, keys, values, attended),
            ProjectAdd(f"{layer}.o", attended, weights.projections[f"{layer}.o"], residual),
            GateUp(
                name=f"{layer}.gate_up",
                residual=residual,
                norm=weights.norms[f"{layer}.ffn_norm"],
                weight=weights.projections[f"{layer}.gate_up"],
                normed=normed,
                y=ffn,
            ),
            ProjectAdd(f"{layer}.down", ffn, weights.projections[f"{layer}.down"], residual),
        ]
    if head != "none":
        ops.append(build_head(geometry, weights, buffers, tokens - 1, tokens))
    if head == "sample":
        ops.append(Sample("sample", buffers["logits"].rows(0, 1), buffers["tokens"].rows(0, 1)))
    ops.append(Advance("advance", tokens, position))
    return ops


def build_head(
    geometry: ModelGeometry, weights: Weights, buffers: Mapping[str, View], start: int, stop: int
) -> Vocabulary:
    """Final norm and vocabulary projection for rows start .. stop - 1 of the residual stream."""
    return Vocabulary(
        name="vocabulary",
        residual=buffers["residual"].rows(start, stop),
        norm=weights.norms["final_norm"],
        weight=weights.projections["embedding" if geometry.tied_embeddings else "vocabulary"],
        normed=buffers["final_normed"].rows(0, stop - start).columns(0, geometry.hidden),
        logits=buffers["logits"].rows(0, stop - start),
    )
