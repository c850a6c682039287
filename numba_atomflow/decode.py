"""The decode step as data: a list of named ops over views.

`build_step` makes the list for one token (decode) or a block of tokens (prefill). It knows no backend: a backend walks
the list, and so do profilers, probes and byte counters. Five ops per layer, each one a stage that a GPU can run as a
single fused kernel.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.memory.kv_cache import NAME as KV_CACHE
from numba_atomflow.memory.kv_cache import kv_cache_buffer, layer_cache
from numba_atomflow.memory.plan import Buffer
from numba_atomflow.memory.view import View

Head = Literal["none", "logits", "sample"]


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A projection's weight: codes [N, K] and group scales [N, ceil(K / 128)]."""

    codes: View
    scales: View

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the weight reads."""
        return self.codes.nbytes + self.scales.nbytes


@dataclass(frozen=True)
class Op:
    """One stage of the step. The fields of its subclasses name every tensor that it touches.

    Attributes:
        READS: fields with activations that the op reads (the KV cache and tables not counted).
        WRITES: fields with activations that it writes, in the order in which it makes them.
        WEIGHTS: fields with weights that it reads.
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
        """The activations that it writes."""
        return tuple(getattr(self, field) for field in self.WRITES)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that the op must read."""
        return sum(getattr(self, field).nbytes for field in self.WEIGHTS)

    def cache_bytes(self, length: int) -> int:
        """Bytes of KV cache that the op must read when `length` positions are filled."""
        del length
        return 0


@dataclass(frozen=True)
class Embed(Op):
    """residual = embedding[tokens]."""

    tokens: View
    embedding: Fp8Weight
    residual: View

    READS = ("tokens",)
    WRITES = ("residual",)
    WEIGHTS = ("embedding",)

    @property
    def weight_bytes(self) -> int:
        """Only the rows of the tokens are read."""
        return self.embedding.nbytes * self.tokens.shape[0] // self.embedding.codes.shape[0]


@dataclass(frozen=True)
class Qkv(Op):
    """Norm, project to q, k and v, rotate q and k, append k and v to the cache."""

    residual: View
    position: View
    norm: View
    weight: Fp8Weight
    cosines: View
    sines: View
    normed: View
    qkv: View
    q: View
    keys: View
    values: View

    READS = ("residual", "position")
    WRITES = ("normed", "qkv", "q")
    WEIGHTS = ("norm", "weight")


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class ProjectAdd(Op):
    """residual += weight * x: the output projection of attention, and the MLP's down projection."""

    x: View
    weight: Fp8Weight
    residual: View

    READS = ("x", "residual")
    WRITES = ("residual",)
    WEIGHTS = ("weight",)


@dataclass(frozen=True)
class GateUp(Op):
    """Norm, project to gate and up, y = silu(gate) * up."""

    residual: View
    norm: View
    weight: Fp8Weight
    normed: View
    y: View

    READS = ("residual",)
    WRITES = ("normed", "y")
    WEIGHTS = ("norm", "weight")


@dataclass(frozen=True)
class FinalNorm(Op):
    """Norm of the rows whose logits are wanted."""

    residual: View
    norm: View
    normed: View

    READS = ("residual",)
    WRITES = ("normed",)
    WEIGHTS = ("norm",)


@dataclass(frozen=True)
class Vocabulary(Op):
    """logits = weight * x."""

    x: View
    weight: Fp8Weight
    logits: View

    READS = ("x",)
    WRITES = ("logits",)
    WEIGHTS = ("weight",)


@dataclass(frozen=True)
class Sample(Op):
    """Choose the next token from the logits, and put it where the next step's embedding looks."""

    logits: View
    token: View

    READS = ("logits",)
    WRITES = ("token",)


@dataclass(frozen=True)
class Advance(Op):
    """position += tokens: the step's last op, so that nothing outside has to patch the next one."""

    tokens: int
    position: View

    READS = ("position",)
    WRITES = ("position",)


def step_buffers(
    geometry: ModelGeometry, max_seq_len: int, block: int, head_rows: int, cache_dtype: str
) -> list[Buffer]:
    """Every buffer of a step except weights and a backend's own scratch.

    Args:
        max_seq_len: positions of the KV cache.
        block: most tokens that a prefill step takes at once.
        head_rows: most positions whose logits are computed at once.
        cache_dtype: element type of the KV cache.
    """
    g = geometry

    def activation(name: str, *shape: int, dtype: str = "float32") -> Buffer:
        return Buffer("activations", name, shape, dtype)

    return [
        kv_cache_buffer(g.layers, max_seq_len, g.kv_dim, cache_dtype),
        activation("tokens", block, dtype="int32"),
        activation("position", 1, dtype="int64"),
        activation("residual", block, g.hidden),
        activation("normed", block, g.hidden),
        activation("qkv", block, g.q_dim + 2 * g.kv_dim),
        activation("q", block, g.q_dim),
        activation("attended", block, g.q_dim),
        activation("ffn", block, g.ffn),
        activation("final_normed", head_rows, g.hidden),
        activation("logits", head_rows, g.vocabulary),
        Buffer("workspace", "rope.cosines", (max_seq_len, g.head_dim // 2), "float32"),
        Buffer("workspace", "rope.sines", (max_seq_len, g.head_dim // 2), "float32"),
    ]


def build_step(
    geometry: ModelGeometry,
    weights: Mapping[str, View],
    buffers: Mapping[str, View],
    tokens: int,
    head: Head,
) -> list[Op]:
    """The ops that take `tokens` tokens through the model, in order.

    Args:
        weights: views of the checkpoint's tensors, by their names there.
        buffers: views of `step_buffers`, by name.
        tokens: tokens of this step; 1 for decode.
        head: "none" (a prompt block that is not the last), "logits" of the last token, or "sample" from them as well.
    """

    def fp8(name: str) -> Fp8Weight:
        return Fp8Weight(weights[f"{name}.weight"], weights[f"{name}.scale"])

    def rows(name: str) -> View:
        return buffers[name].rows(0, tokens)

    residual, normed, q, attended, ffn = map(rows, ("residual", "normed", "q", "attended", "ffn"))
    position = buffers["position"]
    ops: list[Op] = [Embed("embed", rows("tokens"), fp8("embedding"), residual)]
    for i in range(geometry.layers):
        layer = f"layer.{i}"
        keys, values = layer_cache(buffers[KV_CACHE], i)
        ops += [
            Qkv(
                name=f"{layer}.qkv",
                residual=residual,
                position=position,
                norm=weights[f"{layer}.attention_norm"],
                weight=fp8(f"{layer}.qkv"),
                cosines=buffers["rope.cosines"],
                sines=buffers["rope.sines"],
                normed=normed,
                qkv=rows("qkv"),
                q=q,
                keys=keys,
                values=values,
            ),
            Attention(f"{layer}.attention", q, position, keys, values, attended),
            ProjectAdd(f"{layer}.o", attended, fp8(f"{layer}.o"), residual),
            GateUp(f"{layer}.gate_up", residual, weights[f"{layer}.ffn_norm"], fp8(f"{layer}.gate_up"), normed, ffn),
            ProjectAdd(f"{layer}.down", ffn, fp8(f"{layer}.down"), residual),
        ]
    if head != "none":
        ops += build_head(geometry, weights, buffers, tokens - 1, tokens)
    if head == "sample":
        ops.append(Sample("sample", buffers["logits"].rows(0, 1), buffers["tokens"].rows(0, 1)))
    ops.append(Advance("advance", tokens, position))
    return ops


def build_head(
    geometry: ModelGeometry, weights: Mapping[str, View], buffers: Mapping[str, View], start: int, stop: int
) -> list[Op]:
    """Final norm and vocabulary projection for rows start .. stop - 1 of the residual stream."""
    vocabulary = "embedding" if geometry.tied_embeddings else "vocabulary"
    weight = Fp8Weight(weights[f"{vocabulary}.weight"], weights[f"{vocabulary}.scale"])
    normed = buffers["final_normed"].rows(0, stop - start)
    return [
        FinalNorm("final_norm", buffers["residual"].rows(start, stop), weights["final_norm"], normed),
        Vocabulary("vocabulary", normed, weight, buffers["logits"].rows(0, stop - start)),
    ]
