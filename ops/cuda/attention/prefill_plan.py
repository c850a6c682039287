"""How attention of a prefill chunk is divided among CTAs, and how its tiles lie in shared memory.

A CTA computes one query head and `query_tile` tokens of the chunk, over all keys that they see, in blocks of
`key_block` keys: FlashAttention's order, with the scores and the outputs in registers. CTAs are numbered so that the
last tokens of the chunk, which see most keys, come first; the heads that share a KV head are neighbours, so that their
keys and values come from L2.

Shared memory holds Q, and for every stage K and V: [column block of 64 elements][row][128 bytes], with 16-byte chunk c
of a row at chunk c XOR (row % 8). `wgmma` reads this as its 128-byte swizzle, and `ldmatrix` without bank conflicts. A
head of 80 or 96 elements leaves the end of its last column block unused.
"""

from dataclasses import dataclass
from typing import Literal

from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.runtime.chip import Chip

WARPGROUP_ROWS = 64  # queries of a warpgroup: M of wgmma
WGMMA_HEAD_DIMS = (64, 80, 96, 128)
FEW_QUERIES = 64  # of a chunk: one consumer warpgroup's
COLUMN_BLOCK = 64  # elements of a head in a row of a tile: 128 bytes
_ALIGNMENT = {"wgmma": 1024, "mma": 128}  # of tiles in shared memory
_TWO_CTAS_BYTES = 80 * 1024  # shared memory per CTA with which two fit on an SM of sm_80


@dataclass(frozen=True)
class PrefillAttentionPlan:
    """The tiling of prefill attention: a CTA computes `query_tile` tokens of one query head.

    Attributes:
        out: tiled activations, x of the o projection; K is heads * head_dim. FP8 with wgmma and heads of 128.
        instructions: "wgmma" (sm_90 only) or "mma" (`mma.m16n8k16`).
        query_tile: tokens of a CTA: a multiple of 64 with wgmma, of 16 with mma.
        key_block: keys between two updates of the softmax state: a multiple of 16.
        stages: of the pipeline of K and V in shared memory: 2 or more with wgmma, 1 with mma.
        turns: two consumer warpgroups issue their wgmmas by turns, so that one computes its softmax while the tensor
            cores work for the other. Without, they do as they happen to.
        window, soft_cap: as in `AttentionShape`; only with mma.
    """

    heads: int
    kv_heads: int
    head_dim: int
    out: ActivationTiles
    instructions: Literal["wgmma", "mma"]
    query_tile: int
    key_block: int
    stages: int = 1
    turns: bool = True
    sms: int = 1
    window: int = 0
    soft_cap: float = 0.0

    def __post_init__(self) -> None:
        rows = WARPGROUP_ROWS if self.instructions == "wgmma" else 16
        if self.query_tile % rows or self.key_block % 16 or self.head_dim % 16 or self.heads % self.kv_heads:
            raise ValueError(f"prefill attention cannot be tiled like this: {self}")
        if self.instructions == "wgmma" and (self.head_dim > 128 or self.window or self.soft_cap):
            raise ValueError("prefill attention with wgmma has heads of 128 at most, no window and no soft cap")
        if (self.stages > 1) != (self.instructions == "wgmma"):
            raise ValueError(f"prefill attention with {self.instructions} cannot have {self.stages} stages")
        if self.sms > 1 and self.row_blocks > 1:
            raise ValueError("CTAs of prefill attention cannot share keys if a warp has two blocks of rows")
        if self.out.in_features != self.heads * self.head_dim:
            raise ValueError(f"the output of prefill attention is [tokens, heads * head_dim], not {self.out}")
        if self.out.bits == 8 and (self.instructions != "wgmma" or self.head_dim != self.out.block_elements):
            raise ValueError("prefill attention writes FP8 only with wgmma, and heads that are a group of 128")

    @property
    def row_blocks(self) -> int:
        """Blocks of 16 queries that a warp computes. Two (mma only) halve the reads of K and V from shared memory."""
        return 1 if self.instructions == "wgmma" or self.query_tile <= 64 else 2

    @property
    def consumer_warps(self) -> int:
        """Warps that compute."""
        return self.query_tile // 16 // self.row_blocks

    @property
    def threads(self) -> int:
        """Per CTA: with wgmma, a producer warpgroup beside the consumers."""
        return self.consumer_warps * 32 + (128 if self.instructions == "wgmma" else 0)

    @property
    def column_blocks(self) -> int:
        """Column blocks of a head."""
        return -(-self.head_dim // COLUMN_BLOCK)

    @property
    def q_bytes(self) -> int:
        return self.column_blocks * self.query_tile * COLUMN_BLOCK * 2

    @property
    def kv_bytes(self) -> int:
        """Of K, or of V, of one key block."""
        return self.column_blocks * self.key_block * COLUMN_BLOCK * 2

    @property
    def barriers_start(self) -> int:
        """Byte offset of the mbarriers, behind Q and the stages of K and of V."""
        return self.q_bytes + 2 * self.stages * self.kv_bytes

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: tiles, four mbarriers per stage with wgmma, what aligning the start may take; and, at
        the end, 16 bytes for a flag.
        """
        barriers = 4 * 8 * self.stages if self.instructions == "wgmma" else 0
        return self.barriers_start + barriers + _ALIGNMENT[self.instructions] + 16

    @property
    def out_registers(self) -> int:
        """Float32 outputs of a thread. wgmma multiplies whole column blocks."""
        columns = self.column_blocks * COLUMN_BLOCK if self.instructions == "wgmma" else self.head_dim
        return self.row_blocks * columns // 2

    @property
    def cta_partials(self) -> int:
        """Float32 elements that a CTA writes if others share its keys: per thread outputs, two maxima, two row sums."""
        return self.consumer_warps * 32 * (self.out_registers + 4)

    @property
    def partials(self) -> int:
        """Float32 elements of scratch, for every number of tokens."""
        return self.sms * self.cta_partials if self.sms > 1 else 1

    @property
    def counters(self) -> int:
        """Elements of the arrival counters, for every number of tokens."""
        return self.sms

    def ctas(self, tokens: int) -> int:
        """Grid of a chunk padded to `tokens` tokens. One kernel serves all: CTAs without work exit at once."""
        tiles = self.heads * -(-tokens // self.query_tile)
        return tiles * max(1, self.sms // tiles)


def choose_prefill_attention_plan(
    heads: int,
    kv_heads: int,
    head_dim: int,
    out: ActivationTiles,
    chip: Chip,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
    few: bool = False,
) -> PrefillAttentionPlan:
    """The plan for a chip. `few`: for chunks of at most `FEW_QUERIES` tokens.

    wgmma on sm_90: 128 queries, 128 keys, three stages (225 KB with heads of 128). With two, V would be needed some
    2,000 cycles after its stage is free, which is about what loading it takes.
    mma: 4 warps and 64 keys; 128 queries where shared memory has room for two such CTAs per SM, else 64. 32 keys for
    128 queries and heads of 112 and 128, whose outputs take 128 registers of a thread; 64 queries and 32 keys for
    larger heads, 16 keys before sm_90, where ptxas needs more registers. On sm_90 too, it does what wgmma's kernel does
    not: windows, soft caps, other sizes of heads.
    few: one consumer warpgroup, because the second would multiply padding, and two stages.
    """
    if head_dim > 128:
        key_block = 32 if chip.capability[0] >= 9 else 16
        return PrefillAttentionPlan(
            heads, kv_heads, head_dim, out, "mma", 64, key_block, sms=chip.sms, window=window, soft_cap=soft_cap
        )
    if chip.capability[0] == 9 and head_dim in WGMMA_HEAD_DIMS and not window and not soft_cap:
        query_tile, stages = (FEW_QUERIES, 2) if few and out.bits == 16 else (128, 3)
        return PrefillAttentionPlan(
            heads, kv_heads, head_dim, out, "wgmma", query_tile, 128, stages=stages, sms=chip.sms
        )
    query_tile = 128 if chip.shared_bytes >= 2 * _TWO_CTAS_BYTES else 64
    sms = chip.sms if query_tile == 64 else 1
    key_block = 32 if query_tile == 128 and head_dim >= 112 else 64
    return PrefillAttentionPlan(
        heads, kv_heads, head_dim, out, "mma", query_tile, key_block, sms=sms, window=window, soft_cap=soft_cap
    )
