"""What the persistent kernel is made for: a geometry, cut for a chip.

Every multiprocessor runs one block for the whole step: `CONSUMERS` warps that compute, and one that has weights copied
into a ring of slots in shared memory. Projections are cut into tiles of 16 rows, tiles into chunks of `CHUNK` groups of
128 columns: a chunk is what a slot holds, with its scales. Shares are dealt to the blocks in turn, from one projection
to the next, so that over a few layers every block has the same to copy. A share is a tile; or, of "o" and "down", of
which blocks get but one tile or two, half a tile: then a slot holds 8 rows of two neighbouring chunks.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.layout.weights import HALF_GROUP_WORDS, PrepackedLayout

CHUNK = 4  # groups of 128 columns per chunk: 8 KB and its scales, large enough for the copy engine
CONSUMERS = 7  # warps that compute: with the one that copies, 8, which may have 255 registers each
THREADS = 32 * CONSUMERS
BLOCK_THREADS = THREADS + 32
SPLITS = 32  # chunks of the sequence at most: a lane each when they are added up
MOST_QUERIES = 8  # heads that share a key/value head: rows of a fragment
KEYS = 16  # per step of a warp in attention
STEP_KEYS = KEYS * CONSUMERS
ALONE = 2 * STEP_KEYS  # keys that one block takes sooner than several, with what adding up takes
_SHIFTS = 32  # ways of dealing that are compared
_PARTIALS = 64  # chunks' sums that are kept until they are added up
_SCALARS = 64  # float32 for sums over the block
QKV, ATTENTION, OUT, GATE_UP, DOWN, VOCABULARY = range(6)  # kinds of ops, behind the embedding
_KINDS = (QKV, OUT, GATE_UP, DOWN, VOCABULARY)  # projections
_ENTRY_BITS = {QKV: 3, OUT: 3, GATE_UP: 2, DOWN: 3, VOCABULARY: 4}  # 2^so many threads finish a tile
TABLE_UNIT = 32  # words: offsets in the table of weights count 128 bytes


@dataclass(frozen=True)
class PersistentShape:
    """Everything that the kernel is compiled for.

    Attributes:
        sms: blocks of the launch.
        shared_bytes: the most that a block may have; the ring takes what the rest leaves.
        in_flight: chunks on their way at once: more would make every small access wait behind them.
        ahead: chunks that may be asked for beyond a full ring.
        pace: cycles from one of them to the next. Both found on an H100, whose memory gives all blocks a chunk each in
            725 cycles (366 ns), and no worse than others on an H200.
        pause: nanoseconds between two looks at the exchange.
        trace: whether every block writes down when it does what.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    qkv: PrepackedLayout
    o: PrepackedLayout
    gate_up: PrepackedLayout
    down: PrepackedLayout
    vocabulary: PrepackedLayout
    embedding: PrepackedLayout
    sms: int
    shared_bytes: int
    in_flight: int = 4
    ahead: int = 20
    pace: int = 680
    pause: int = 30
    trace: bool = False

    # --- ops -----------------------------------------------------------------------------------------------------

    @property
    def ops(self) -> int:
        """Embedding, five ops a layer, vocabulary: in the order of `decode.build_step`."""
        return 5 * self.layers + 2

    @property
    def matrices(self) -> tuple[PrepackedLayout, ...]:
        """Projections, in the order of their kinds."""
        return self.qkv, self.o, self.gate_up, self.down, self.vocabulary

    def sizes(self, what: str) -> dict[int, int]:
        """A number for each kind of projection: an attribute of its layout, or

        - "halved": 1 if its shares are half tiles, else 0;
        - "shares": how many there are; "slots": of the ring that one takes;
        - "dealt": by how many blocks dealing goes on behind it;
        - "entry_bits": 2^so many threads finish a share;
        - "round_shares": those whose slots' sums a block keeps before it adds them up.
        """
        layouts = dict(zip(_KINDS, self.matrices, strict=True))
        halved = {kind: int(kind in (OUT, DOWN) and _can_be_halved(layout)) for kind, layout in layouts.items()}
        slots = {kind: layout.k_tiles // (1 + halved[kind]) for kind, layout in layouts.items()}
        match what:
            case "halved":
                return halved
            case "shares":
                return {kind: layout.tiles * (1 + halved[kind]) for kind, layout in layouts.items()}
            case "slots":
                return slots
            case "dealt":
                return self.sizes("shares") | {DOWN: self.sizes("shares")[DOWN] + self.shift}
            case "entry_bits":
                return {kind: bits - halved[kind] for kind, bits in _ENTRY_BITS.items()}
            case "round_shares":
                return {kind: max(1, _PARTIALS // count) for kind, count in slots.items()}
        return {kind: int(getattr(layout, what)) for kind, layout in layouts.items()}

    @property
    def shift(self) -> int:
        """Blocks that dealing skips behind every layer, so that no block has much more to copy than others: where a
        layer's shares are a multiple of the blocks, the same blocks would get more than their part in each.
        """
        return min(range(_SHIFTS), key=lambda shift: self.copied(shift).max())

    def copied(self, shift: int) -> NDArray[np.int64]:
        """Slots that each block fills in a step, if dealing skips so many blocks behind every layer."""
        shares, slots, blocks = self.sizes("shares"), self.sizes("slots"), self.sms
        offset, copied = 0, np.zeros(blocks, np.int64)
        for kind in (QKV, OUT, GATE_UP, DOWN) * self.layers + (VOCABULARY,):
            first = (np.arange(blocks) - offset) % blocks
            copied += -((first - shares[kind]) // blocks) * slots[kind]
            offset += shares[kind] + (shift if kind == DOWN else 0)
        return copied

    def picker(self, what: str) -> Any:
        """Device function (kind) -> the number that `sizes` has for it."""
        sizes = self.sizes(what)
        qkv, o, gate_up, down, vocabulary = (np.int32(size) for size in sizes.values())

        @ptx.device_function
        def pick(kind):
            size = qkv if kind == QKV else o if kind == OUT else gate_up
            return down if kind == DOWN else vocabulary if kind == VOCABULARY else size

        return pick

    @property
    def ratio(self) -> int:
        """Heads that share a key/value head."""
        return self.heads // self.kv_heads

    @property
    def splits(self) -> int:
        """Chunks of the sequence, per key/value head, at most."""
        return max(1, min(SPLITS, self.sms // self.kv_heads))

    # --- shared memory, in 32-bit words ------------------------------------------------------------------------------

    @property
    def slot_words(self) -> int:
        """A chunk of any projection."""
        return max(m.k_tile_words for m in self.matrices)

    @property
    def slots(self) -> int:
        """Of the ring.

        A barrier's parity tells a chunk from the one before it in the same slot, not from the one before that. A warp
        may wait for chunk n when chunk n - `CONSUMERS`, which it had, is the last that it knows to have landed, and
        with it all up to n - `CONSUMERS` - `in_flight`; chunk n - `slots` must be among these. Or it is the warp's own
        last one.
        """
        room = (self.shared_bytes // 4 - self._rest_words) // (self.slot_words + 4)
        return room if room >= self.in_flight + CONSUMERS else min(room, CONSUMERS)

    @property
    def _rest_words(self) -> int:
        return self.x_words + 2 * self.partial_words + _SCALARS + self.head_dim + self.table_words

    @property
    def query_pitch(self) -> int:
        """Words from one query to the next in shared memory: 16 more than a multiple of 32, for the banks."""
        words = self.head_dim // 2
        return words + (16 - words) % 32

    @property
    def x_words(self) -> int:
        """The vector that a projection reads, float16; or what attention keeps: queries, the newest key, sums."""
        widest = max(m.padded_in_features for m in (self.qkv, self.o, self.gate_up, self.down)) // 2
        attention = MOST_QUERIES * self.query_pitch + self.head_dim + self.sum_parts * self.ratio * (self.head_dim + 2)
        return -(-max(widest, attention) // 32) * 32

    @property
    def sum_parts(self) -> int:
        """What attention adds up in a block: a sum for each warp, and the token's own key."""
        return CONSUMERS + 1

    @property
    def partial_words(self) -> int:
        """Sums of the slots of a round: 16 rows each."""
        return max(_PARTIALS, *self.sizes("slots").values()) * 16

    @property
    def table_words(self) -> int:
        return -(-2 * self.ops // 4) * 4

    @property
    def x_start(self) -> int:
        return self.slots * self.slot_words

    @property
    def partials_start(self) -> int:
        return self.x_start + self.x_words

    @property
    def scalars_start(self) -> int:
        return self.partials_start + 2 * self.partial_words

    @property
    def rope_start(self) -> int:
        """Cosines, then sines, of the token's position."""
        return self.scalars_start + _SCALARS

    @property
    def table_start(self) -> int:
        return self.rope_start + self.head_dim

    @property
    def barriers_start(self) -> int:
        """In words of 8 bytes: `slots` barriers of chunks that have landed, then `slots` of slots that are free."""
        return (self.table_start + self.table_words) // 2

    @property
    def block_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return 8 * (self.barriers_start + 2 * self.slots)

    # --- the exchange between blocks, in words of 8 bytes ------------------------------------------------------------

    @property
    def exchange(self) -> dict[str, int]:
        """Where each op's results lie in the exchange, and under "end" its size. See `exchange.py`."""
        sizes = {
            "entering": self.hidden // 2,  # residual stream before attention, as pairs
            "entering_exact": self.hidden,
            "middle": self.hidden // 2,  # before the MLP
            "middle_exact": self.hidden,
            "q": self.heads * self.head_dim // 2,
            "k": self.kv_heads * self.head_dim // 2,
            "v": self.kv_heads * self.head_dim // 2,
            "attended": self.heads * self.head_dim // 2,
            "ffn": self.ffn // 2,
            "sums": self.splits * self.heads * self.head_dim,
            "stats": self.splits * self.heads * 2,
        }
        starts, at = {}, 0
        for name, size in sizes.items():
            starts[name] = at
            at += -(-size // 16) * 16
        return starts | {"end": at}

    # --- what does not work ------------------------------------------------------------------------------------------

    def refusal(self) -> str | None:
        """Why this shape can't be run; None if it can."""
        if not all(matrix.format.converter != "bits" for matrix in self.matrices):
            return "it has no instruction that decodes FP8 (sm_89 and later do)"
        if self.hidden % 16 or self.ffn % 8 or self.head_dim % 16:
            return "its widths are not multiples of 16"
        if self.ratio > MOST_QUERIES:
            return f"{self.ratio} heads share a key/value head, and {MOST_QUERIES} is the most"
        if self.kv_heads > self.sms:
            return f"it has more key/value heads than this GPU has SMs ({self.sms})"
        if self.slots < max(CONSUMERS, self.in_flight + 1):
            return f"{self.shared_bytes // 1024} KB of shared memory leave no room for a ring of weights"
        return None


def _can_be_halved(layout: PrepackedLayout) -> bool:
    """Whether the chunks of a tile make whole pairs."""
    whole = layout.k_tiles % 2 == 0 and layout.last_k_tile_groups == CHUNK
    return (
        layout.split_rows and whole and layout.k_tile_words == 2 * CHUNK * HALF_GROUP_WORDS
    )  # nothing pads the halves
