"""The buffers of a step: activations, KV cache and RoPE tables, for the sizes and dtypes that a backend chooses."""

from dataclasses import dataclass

from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.memory.kv_cache import kv_cache_buffer
from numba_atomflow.memory.plan import Buffer
from numba_atomflow.model.rope_tables import tables_of
from numba_atomflow.ops.formats import KV_FLOAT32, KvFormat

PROJECTED, GATE_UP = "projected", "gate_up"  # scratch of families that need it


@dataclass(frozen=True, slots=True)
class StepSizes:
    """Sizes and dtypes of a backend's buffers.

    Attributes:
        max_seq_len: positions of the KV cache that a sequence may use.
        step_tokens: most tokens of a step, padding tokens included.
        head_rows: most rows whose logits are computed at once.
        activation: dtype of the inputs of projections and attention.
        cache: format of the KV cache.
        pad_multiple: the inputs of projections are zero-padded to a multiple of this along K.
        input_tokens: most tokens of a step whose projections read their inputs in row order; None: `step_tokens`.
        spare_positions: KV cache positions after the last, which padding tokens write and nothing reads.
        keep_qkv: whether q, k and v are written to memory before RoPE.
        keep_gate_up: whether gate and up are written to memory before GELU.
    """

    max_seq_len: int
    step_tokens: int
    head_rows: int
    activation: str = "float32"
    cache: KvFormat = KV_FLOAT32
    pad_multiple: int = 1
    input_tokens: int | None = None
    spare_positions: int = 0
    keep_qkv: bool = True
    keep_gate_up: bool = True


def step_buffers(geometry: ModelGeometry, sizes: StepSizes) -> list[Buffer]:
    """Every buffer of a step except weights and a backend's own scratch."""
    g, tokens = geometry, sizes.step_tokens
    inputs = tokens if sizes.input_tokens is None else sizes.input_tokens
    positions = sizes.max_seq_len + sizes.spare_positions

    def padded(width: int) -> int:
        return -(-width // sizes.pad_multiple) * sizes.pad_multiple

    def activation(name: str, *shape: int, dtype: str = "float32") -> Buffer:
        return Buffer("activations", name, shape, dtype)

    buffers = [
        kv_cache_buffer(g.layers, positions, g.kv_dim, sizes.cache.dtype),
        activation("tokens", tokens, dtype="int32"),
        activation("position", 1, dtype="int64"),
        activation("residual", tokens, g.hidden),
        activation("x_norm", inputs, padded(g.hidden), dtype=sizes.activation),
        activation("q", tokens, g.q_dim, dtype=sizes.activation),
        activation("attn_out", inputs, padded(g.q_dim), dtype=sizes.activation),
        activation("intermediate", inputs, padded(g.ffn), dtype=sizes.activation),
        activation("final_x_norm", sizes.head_rows, padded(g.hidden), dtype=sizes.activation),
        activation("logits", sizes.head_rows, g.vocabulary),
        *(
            Buffer("workspace", f"{table}.{part}", (positions, g.head_dim // 2), "float32")
            for table in tables_of(g)
            for part in ("cosines", "sines")
        ),
    ]
    if g.post_norm:
        buffers.append(activation(PROJECTED, tokens, g.hidden))
    if g.hidden_act != "silu" and sizes.keep_gate_up:
        buffers.append(activation(GATE_UP, tokens, 2 * g.ffn))
    if sizes.keep_qkv:
        buffers.append(activation("qkv", tokens, g.q_dim + 2 * g.kv_dim))
    return buffers
