"""The static schedule of the persistent kernel, and its memory: a model's geometry cut for a chip.

Every SM runs one CTA for the whole step: `CONSUMER_WARPS` warps that compute, and one producer warp that issues TMA
bulk copies of weights into a pipeline of stages in shared memory. The output of a projection is cut into tiles of 16
rows, and a tile along K into k-tiles of `K_TILE_GROUPS` groups of 128 weights: a stage holds a k-tile with its scales.

Work tiles are assigned to CTAs round-robin, statically; each projection goes on where the one before it ended, so that
over a few layers every CTA has the same number of bytes to copy. A work tile is a tile. For the o and down
projections, of which a CTA gets only one tile or two, it is an 8-row (M/2) tile: a stage then holds 8 rows of two
neighbouring k-tiles.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.layout.weights import HALF_GROUP_WORDS, PrepackedLayout

K_TILE_GROUPS = 4  # groups of 128 weights along K: 8 KB and their scales, enough for an efficient bulk copy
CONSUMER_WARPS = 7  # with the producer 8 warps, which may have 255 registers per thread
CONSUMER_THREADS = 32 * CONSUMER_WARPS
CTA_THREADS = CONSUMER_THREADS + 32
MAX_KV_SPLITS = 32  # one lane per split when they are combined
MAX_QUERY_GROUP = 8  # query heads per KV head: rows of an mma fragment
WARP_KEYS = 16  # keys per iteration of a warp in attention
CTA_KEYS = WARP_KEYS * CONSUMER_WARPS
ONE_SPLIT_KEYS = 2 * CTA_KEYS  # up to so many keys, one CTA takes less time than several and their combining
_ROTATIONS = 32  # candidates for the rotation of the schedule
_PARTIAL_SUMS = 64  # k-tiles whose sums are kept until they are reduced; for 4 and 8 columns half as many
_MMA_ROWS = 16  # of a fragment
MAX_COLUMNS = 8  # of a step: columns of the mma's B operand
_REDUCTION_WORDS = 64  # scratch for reductions over the CTA
OPS_PER_LAYER = 5
QKV, ATTENTION, O_PROJ, GATE_UP, DOWN, LM_HEAD = range(6)  # kinds of ops after the embedding
_EPILOGUE_BITS = {QKV: 3, O_PROJ: 3, GATE_UP: 2, DOWN: 3, LM_HEAD: 4}  # 2^bits threads for a 16-row tile
TABLE_UNIT = 32  # words: offsets in the table of weights count 128 bytes
HEAD_VECTORS = 3  # of a layer, in the table: bias of q, k and v, norm of q, norm of k


@dataclass(frozen=True)
class OpIndex:
    """Numbers of a step's ops, in the order of `model.step.build_step`: 0 is the embedding, then five ops per layer in
    the order of their kinds, then the LM head.
    """

    layers: int

    @property
    def count(self) -> int:
        """Ops of a step."""
        return OPS_PER_LAYER * self.layers + 2

    @property
    def lm_head(self) -> int:
        return self.count - 1

    def of_layer(self, layer: int, kind: int) -> int:
        """Number of an op of a layer."""
        return 1 + OPS_PER_LAYER * layer + kind

    def layer(self, op: int) -> int:
        """Layer of an op: 0 for the embedding, the number of layers for the LM head."""
        return max(0, (op - 1) // OPS_PER_LAYER)


@ptx.device_function
def layer_of(op):
    """Device function: layer of an op from 1 on; the number of layers for the LM head."""
    return (op - 1) // OPS_PER_LAYER


def make_kind_of(shape: "PersistentShape") -> Any:
    """Device function (op) -> its kind; op from 1 on."""
    lm_head = shape.op_index.lm_head

    @ptx.device_function
    def kind_of(op):
        return np.int32(LM_HEAD) if op == lm_head else np.int32((np.int32(op) - np.int32(1)) % np.int32(OPS_PER_LAYER))

    return kind_of


@dataclass(frozen=True)
class ProjectionPlan:
    """How a projection is cut into work tiles.

    Attributes:
        half_tiles: a work tile has 8 rows instead of 16, and a stage holds them of two k-tiles.
        k_halves: a work tile is one half of a tile along K: number 2 i is the first half of tile i, 2 i + 1 the second,
            which continues the sums of the first.
        partial_sums: k-tiles whose sums are kept until they are reduced.
    """

    kind: int
    layout: PrepackedLayout
    half_tiles: bool
    k_halves: bool = False
    partial_sums: int = _PARTIAL_SUMS

    @property
    def work_tiles(self) -> int:
        return self.layout.tiles * (1 + self.half_tiles) * (1 + self.k_halves)

    @property
    def work_tile_stages(self) -> int:
        """Pipeline stages that a work tile passes through: its k-tiles, or pairs of them."""
        return self.layout.k_tiles // (1 + self.half_tiles) // (1 + self.k_halves)

    @property
    def staged_features(self) -> int:
        """Elements of the input that a CTA stages."""
        return self.layout.padded_in_features // (1 + self.k_halves)

    @property
    def epilogue_bits(self) -> int:
        """2^bits threads run the epilogue of a work tile."""
        return _EPILOGUE_BITS[self.kind] - self.half_tiles

    @property
    def round_work_tiles(self) -> int:
        """Work tiles whose partial sums a CTA keeps before it reduces them."""
        return max(1, self.partial_sums // self.work_tile_stages)


class MailboxOffsets(NamedTuple):
    """Where each op's results lie in the mailbox, in its words of 8 bytes (`comm/flagged.py`).

    Attributes:
        residual_in, residual_mid: the residual stream before attention and before the MLP, as pairs of 24-bit floats.
        residual_in_exact, residual_mid_exact: the same as float32.
        q, k, v: of the token, rotated; pairs of float16 that RoPE rotates together. With `rope_in_attention`, `q` has
            the float32 sums of the whole QKV projection, row after row, and `k` and `v` are empty.
        attn_out, intermediate: pairs of float16; none with several columns (`wide_vectors.py`).
        partials, softmax_stats: of the KV splits: weighted sums of values, and (m, l) of each.
        best_keys: of each rank, for each column, the sort key of its most likely token, in two words; none with one
            GPU.
        down_sums: of the down projection over the first half of K; there with `ProjectionPlan.k_halves`.
        end: words in all.
    """

    residual_in: int
    residual_in_exact: int
    residual_mid: int
    residual_mid_exact: int
    q: int
    k: int
    v: int
    attn_out: int
    intermediate: int
    partials: int
    softmax_stats: int
    best_keys: int
    down_sums: int
    end: int


@dataclass(frozen=True)
class RankShape:
    """What a rank's kernel knows of the whole model, where several GPUs share it (tensor parallelism).

    Attributes:
        ranks: GPUs, from 2 on.
        gpu_sms: SMs of a whole GPU: on them the number of KV splits depends, so that it is that of one GPU.
        vocabulary: rows of the LM head of all ranks together.
    """

    ranks: int
    gpu_sms: int
    vocabulary: int


@dataclass(frozen=True)
class PersistentShape:
    """Everything that the kernel is compiled for.

    With `rank`, heads, KV heads, `intermediate` and the rows of all projections are a rank's own; `hidden` and what
    projections read are the model's.

    Attributes:
        sms: CTAs of the launch.
        shared_bytes: of a CTA at most; the pipeline takes what the rest leaves.
        copies_in_flight: bulk copies under way at once: with more, every small access would queue behind them.
        prefetch_distance: k-tiles that may be prefetched into L2 beyond a full pipeline.
        prefetch_interval_cycles: from one prefetch to the next. Both were tuned on an H100, whose memory serves a
            k-tile per CTA in 725 cycles (366 ns); on an H200 no other values were better.
        poll_interval_ns: between two polls of the mailbox.
        trace: every CTA writes timestamps.
        columns: tokens of a step, one after the other: 1, or 2, 4 or 8 for the kernel of `wide_kernel.py`.
        k_halves: with 2 or 4 columns, too, tiles of `down` are cut in halves along K: half of its inputs take less
            shared memory.
        rank: what there is beside this rank's part; None: one GPU has the whole model.
        qkv_bias, qk_norm: whether the model has a bias of q, k and v, and a norm of each head of q and k.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    qkv: PrepackedLayout
    o: PrepackedLayout
    gate_up: PrepackedLayout
    down: PrepackedLayout
    lm_head: PrepackedLayout
    embedding: PrepackedLayout
    sms: int
    shared_bytes: int
    copies_in_flight: int = 4
    prefetch_distance: int = 20
    prefetch_interval_cycles: int = 680
    poll_interval_ns: int = 30
    trace: bool = False
    columns: int = 1
    k_halves: bool = False
    rank: RankShape | None = None
    qkv_bias: bool = False
    qk_norm: bool = False

    # --- ops and their work tiles ------------------------------------------------------------------------------------

    @property
    def op_index(self) -> OpIndex:
        return OpIndex(self.layers)

    @property
    def ops(self) -> int:
        return self.op_index.count

    def launches_of(self, op: int) -> tuple[tuple[int, int], ...]:
        """The launches that run an op by itself: of each the first op, and the one after the last.

        With `rope_in_attention`, attention is part of the QKV op. The projection first runs alone: attention would take
        words that `publish.py` has made of finished heads for its sums.
        """
        layer = self.op_index.layer(op)
        if self.rope_in_attention and layer < self.layers and op == self.op_index.of_layer(layer, QKV):
            return (op, op + 1), (op, op + 2)
        return ((op, op + 1),)

    @property
    def layouts(self) -> tuple[PrepackedLayout, ...]:
        """Of the projections, in the order of their kinds."""
        return self.qkv, self.o, self.gate_up, self.down, self.lm_head

    @cached_property
    def plans(self) -> dict[int, ProjectionPlan]:
        """Of the projections, by kind."""
        layouts = zip((QKV, O_PROJ, GATE_UP, DOWN, LM_HEAD), self.layouts, strict=True)
        return {
            kind: ProjectionPlan(
                kind,
                layout,
                self._takes_half_tiles(kind, layout),
                self._takes_k_halves(kind, layout),
                self._partial_sums,
            )
            for kind, layout in layouts
        }

    def _takes_half_tiles(self, kind: int, layout: PrepackedLayout) -> bool:
        """8 columns leave none of the mma's B operand for the second k-tile of a stage of 8-row tiles. Halves along K
        are not cut again.
        """
        takes = kind in (O_PROJ, DOWN) and self.columns < MAX_COLUMNS and _has_half_tiles(layout)
        return takes and not self._takes_k_halves(kind, layout)

    def _takes_k_halves(self, kind: int, layout: PrepackedLayout) -> bool:
        """The input of `down` is the widest: 8 of them would leave little room for the pipeline, and take long to
        stage. With an even number of CTAs all work tiles of a CTA have the same half of K.
        """
        asked = self.columns == MAX_COLUMNS or (self.columns > 1 and self.k_halves)
        whole = layout.k_tiles % 2 == 0 and layout.in_features == layout.padded_in_features
        return kind == DOWN and asked and self.sms % 2 == 0 and whole and _is_whole(layout)

    @property
    def _partial_sums(self) -> int:
        """K-tiles whose sums are kept until they are reduced."""
        return max(_PARTIAL_SUMS // 2, _PARTIAL_SUMS * 2 // self.columns) if self.columns > 1 else _PARTIAL_SUMS

    def by_kind(self, size: Callable[[ProjectionPlan], int]) -> Any:
        """Device function (kind) -> a size of this kind's plan."""
        qkv, o_proj, gate_up, down, lm_head = (np.int32(size(plan)) for plan in self.plans.values())

        @ptx.device_function
        def select(kind):
            value = qkv if kind == QKV else o_proj if kind == O_PROJ else gate_up
            return down if kind == DOWN else lm_head if kind == LM_HEAD else value

        return select

    def schedule_advance(self, plan: ProjectionPlan) -> int:
        """CTAs by which the round-robin schedule moves on after a projection."""
        return plan.work_tiles + (self.rotation if plan.kind == DOWN else 0)

    @cached_property
    def rotation(self) -> int:
        """CTAs that the schedule skips after every layer, so that none has much more to copy than others: where a
        layer's work tiles are a multiple of the CTAs, the same CTAs would get more than their share in each.
        """
        return min(range(_ROTATIONS), key=lambda rotation: self.stages_filled(rotation).max())

    def stages_filled(self, rotation: int) -> NDArray[np.int64]:
        """Pipeline stages that each CTA fills in a step, with this rotation after every layer."""
        offset, filled = 0, np.zeros(self.sms, np.int64)
        for kind in (QKV, O_PROJ, GATE_UP, DOWN) * self.layers + (LM_HEAD,):
            plan = self.plans[kind]
            first = (np.arange(self.sms) - offset) % self.sms
            filled += -((first - plan.work_tiles) // self.sms) * plan.work_tile_stages
            offset += plan.work_tiles + (rotation if kind == DOWN else 0)
        return filled

    @property
    def query_group(self) -> int:
        """Query heads per KV head (GQA)."""
        return self.heads // self.kv_heads

    @property
    def rope_in_attention(self) -> bool:
        """Whether q, k and v are finished by attention (`heads.py`), not by the epilogue of the QKV projection, whose
        rows are then in plain order.
        """
        return self.qkv_bias or self.qk_norm

    @property
    def attention_columns(self) -> int:
        """Columns that share the keys that are read: a power of two, with at most 16 rows of query heads."""
        return min(self.columns, 1 << max(1, _MMA_ROWS // self.query_group).bit_length() - 1)

    @property
    def attention_rows(self) -> int:
        """Query heads of these columns: rows of the fragments in attention."""
        return self.attention_columns * self.query_group

    @property
    def attention_half_tile(self) -> bool:
        """Whether they fit into an M/2 tile."""
        return self.attention_rows <= _MMA_ROWS // 2

    @property
    def query_rows(self) -> int:
        """Rows of queries that shared memory has room for."""
        return _MMA_ROWS // 2 if self.attention_half_tile else _MMA_ROWS

    @property
    def kv_splits(self) -> int:
        """CTAs per KV head at most (split-KV)."""
        sms, kv_heads = self.sms, self.kv_heads
        if self.rank is not None:
            sms, kv_heads = self.rank.gpu_sms, self.kv_heads * self.rank.ranks
        return max(1, min(MAX_KV_SPLITS, sms // kv_heads))

    @property
    def ranks(self) -> int:
        """GPUs that share the model."""
        return 1 if self.rank is None else self.rank.ranks

    @property
    def vocabulary(self) -> int:
        """Logits of a token, of all ranks together."""
        return self.lm_head.out_features if self.rank is None else self.rank.vocabulary

    # --- shared memory, in 32-bit words ------------------------------------------------------------------------------

    @property
    def stage_words(self) -> int:
        """A k-tile of any projection."""
        return max(layout.k_tile_words for layout in self.layouts)

    @property
    def stages(self) -> int:
        """Stages of the pipeline.

        The parity of an mbarrier tells a phase from the one before it, not from the one before that. A warp may wait
        for k-tile n when k-tile n - `CONSUMER_WARPS`, which it consumed, is the latest that is known to be complete,
        and with it all up to n - `CONSUMER_WARPS` - `copies_in_flight`; k-tile n - `stages` must be among these. Or
        k-tile n - `stages` is the last one that the warp itself consumed.
        """
        stages = (self.shared_bytes // 4 - self._rest_words) // (self.stage_words + 4)
        return stages if stages >= self.copies_in_flight + CONSUMER_WARPS else min(stages, CONSUMER_WARPS)

    @property
    def _rest_words(self) -> int:
        rope_words = self.columns * self.head_dim
        return self.x_words + 2 * self.partial_words + _REDUCTION_WORDS + rope_words + self.table_words

    @property
    def query_pitch(self) -> int:
        """Words from one query to the next: 16 more than a multiple of 32, against bank conflicts."""
        words = self.head_dim // 2
        return words + (16 - words) % 32

    @property
    def x_words(self) -> int:
        """The input of a projection, float16; or the working set of attention: queries, newest key and value, sums."""
        widest = self._widest_input // 2
        result_words = self.partial_results * self.attention_rows * (self.head_dim + 2)
        attention = self.query_rows * self.query_pitch + self.columns * self.head_dim + result_words
        inputs = widest if self.columns == 1 else self.columns * self.x_pitch
        return -(-max(inputs, attention) // 32) * 32

    @property
    def _widest_input(self) -> int:
        return max(plan.staged_features for plan in self.plans.values())

    @property
    def x_pitch(self) -> int:
        """Words from the input of one column to that of the next: an odd multiple of 64, so that `swizzled` moves every
        other column to other banks.
        """
        widest = self._widest_input // 2
        return (-(-widest // 64) | 1) * 64

    @property
    def partial_results(self) -> int:
        """Partial results that attention combines in a CTA: one per warp, and the newest key."""
        return CONSUMER_WARPS + 1

    @property
    def partial_words(self) -> int:
        """Partial sums of a round's stages: 16 rows each, of each column."""
        stages = max(self._partial_sums, *(plan.work_tile_stages for plan in self.plans.values()))
        return stages * 16 * self.columns

    @property
    def table_entries(self) -> int:
        """Of the table of weights: two for each op; then, with `rope_in_attention`, `HEAD_VECTORS` for each layer."""
        return 2 * self.ops + (HEAD_VECTORS * self.layers if self.rope_in_attention else 0)

    @property
    def table_words(self) -> int:
        return -(-self.table_entries // 4) * 4

    @property
    def x_start(self) -> int:
        return self.stages * self.stage_words

    @property
    def partials_start(self) -> int:
        return self.x_start + self.x_words

    @property
    def reduction_start(self) -> int:
        return self.partials_start + 2 * self.partial_words

    @property
    def rope_start(self) -> int:
        """Cosines, then sines, of the token's position; those of one column after those of another."""
        return self.reduction_start + _REDUCTION_WORDS

    @property
    def table_start(self) -> int:
        return self.rope_start + self.columns * self.head_dim

    @property
    def full_start(self) -> int:
        """The full barriers, one per stage, in words of 8 bytes."""
        return (self.table_start + self.table_words) // 2

    @property
    def empty_start(self) -> int:
        """The empty barriers."""
        return self.full_start + self.stages

    @property
    def dynamic_shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA."""
        return 8 * (self.empty_start + self.stages)

    # --- the mailbox -------------------------------------------------------------------------------------------------

    @property
    def mailbox(self) -> MailboxOffsets:
        """Offsets of the mailbox; every part begins at a multiple of 128 bytes, and has one column after the other."""
        q_words, kv_words = self.heads * self.head_dim // 2, self.kv_heads * self.head_dim // 2
        if self.rope_in_attention:
            q_words, kv_words = self.qkv.out_features, 0
        single = self.columns == 1
        sizes = {
            "residual_in": self.hidden // 2,
            "residual_in_exact": self.hidden,
            "residual_mid": self.hidden // 2,
            "residual_mid_exact": self.hidden,
            "q": q_words,
            "k": kv_words,
            "v": kv_words,
            "attn_out": self.o.in_features // 2 * single,
            "intermediate": self.down.in_features // 2 * single,
            "partials": self.kv_splits * self.heads * self.head_dim,
            "softmax_stats": self.kv_splits * self.heads * 2,
            "best_keys": 0 if self.rank is None else 2 * self.ranks,
            "down_sums": self.hidden * self.plans[DOWN].k_halves,  # a rank takes those of its own rows
        }
        starts, end = {}, 0
        for name, size in sizes.items():
            starts[name] = end
            end += -(-size * self.columns // 16) * 16
        return MailboxOffsets(**starts, end=end)

    @property
    def attn_out_words(self) -> int:
        """Of all columns, in `wide_vectors.LayerVectors`."""
        return self.columns * self.o.in_features // 2

    @property
    def vector_words(self) -> int:
        """Of a layer, in `wide_vectors.LayerVectors`."""
        return self.attn_out_words + self.columns * self.down.in_features // 2

    @property
    def early_intermediate(self) -> int:
        """Elements of `intermediate` whose tiles come before the last round of gate_up in every CTA that has them."""
        plan = self.plans[GATE_UP]
        before = (-(-plan.work_tiles // self.sms) - 1) // plan.round_work_tiles * plan.round_work_tiles
        return min(self.intermediate, before * self.sms * _MMA_ROWS // 2)

    # --- what does not work ------------------------------------------------------------------------------------------

    def refusal(self) -> str | None:
        """Why this shape can't be run; None if it can."""
        if not all(layout.format.converter != "bits" for layout in self.layouts):
            return "it has no instruction that converts FP8 (sm_89 and later do)"
        if self.hidden % 16 or self.intermediate % 8 or self.head_dim % 16:
            return "its widths are not multiples of 16"
        if self.query_group > MAX_QUERY_GROUP:
            return f"{self.query_group} heads share a key/value head, and {MAX_QUERY_GROUP} is the most"
        if self.kv_heads * self.kv_splits > self.sms:
            return f"it has more key/value heads than this GPU has SMs ({self.sms})"
        if self.stages < max(CONSUMER_WARPS, self.copies_in_flight + 1):
            return f"{self.shared_bytes // 1024} KB of shared memory leave no room for a pipeline of weights"
        return None


def _has_half_tiles(layout: PrepackedLayout) -> bool:
    """Whether the k-tiles of a tile make whole pairs, each of two 8-row parts without padding."""
    return layout.split_rows and layout.k_tiles % 2 == 0 and _is_whole(layout)


def _is_whole(layout: PrepackedLayout) -> bool:
    """Whether every k-tile has all groups."""
    whole = layout.last_k_tile_groups == K_TILE_GROUPS
    return whole and layout.k_tile_words == 2 * K_TILE_GROUPS * HALF_GROUP_WORDS
