"""How a GEMV is tiled: warps of a CTA, split-K, loads in flight, and the layout of its shared memory.

`choose_plan` picks one per projection from measurements. Cost model: N * K * (1 + 1 / 32) bytes. At 4.66 TB/s, and
with the 2.5-4 us that every kernel costs beyond its bytes:

==========================  =======  ==========  ==============
Llama 3.2 3B                   MB     us (bytes)  us (kernel)
==========================  =======  ==========  ==============
qkv        5120 x 3072         16.2     3.5         6-7.5
o          3072 x 3072          9.7     2.1         4.6-6
gate_up   16384 x 3072         51.9    11.1         13.6-15
down       3072 x 8192         26.0     5.6         8-9.6
lm_head  128256 x 3072        406.3    87.2         90-91
==========================  =======  ==========  ==============
"""

from dataclasses import dataclass

from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout
from numba_atomflow.ops.cuda.runtime.chip import Chip


@dataclass(frozen=True)
class GemvPlan:
    """The tiling of one projection y = W x for a few tokens.

    Shared memory, in 32-bit words: x of every token (float16 pairs), two buffers of split-K partial sums (float32), and
    the warps' sums of squares (float32).

    Attributes:
        layout: of the prepacked weights W [out_features, in_features].
        tokens: N of the `mma` instruction: 1 to 8.
        warps: of a CTA.
        split_k: warps that share a tile of 16 rows: 1, 2, 4 ... up to `warps`.
        groups_in_flight: groups of 128 weights along K that a warp loads at once: 2 KB each.
        ctas_per_sm: CTAs resident on an SM: with 8 warps and 4 KB of weights each, two have 64 KB in flight.
    """

    layout: PrepackedLayout
    tokens: int = 1
    warps: int = 8
    split_k: int = 8
    groups_in_flight: int = 2
    ctas_per_sm: int = 2

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return self.warps * 32

    @property
    def tiles_per_cta(self) -> int:
        """Tiles that a CTA computes at the same time, `split_k` warps each."""
        return self.warps // self.split_k

    def ctas(self, sms: int) -> int:
        """CTAs of a launch: one wave at most."""
        needed = -(-self.layout.tiles // self.tiles_per_cta)
        return min(needed, sms * self.ctas_per_sm)

    # --- K of a tile -------------------------------------------------------------------------------------------------

    @property
    def batches(self) -> int:
        """Batches of `groups_in_flight` groups that a warp loads and multiplies per tile."""
        groups_per_warp = -(-self.layout.groups // self.split_k)
        return -(-groups_per_warp // self.groups_in_flight)

    @property
    def uniform(self) -> bool:
        """Whether every batch of every warp is full: then no group index needs a test."""
        return self.layout.groups == self.batches * self.groups_in_flight * self.split_k

    # --- shared memory -----------------------------------------------------------------------------------------------

    @property
    def in_features(self) -> int:
        """K, without padding."""
        return self.layout.in_features

    @property
    def x_words(self) -> int:
        """Words of one token's x, padded to whole groups."""
        return self.layout.padded_in_features // 2

    @property
    def x_pitch(self) -> int:
        """Words from one token's x to the next: 4 more than a multiple of 64, against bank conflicts."""
        return self.x_words + 4

    @property
    def partials_start(self) -> int:
        """Word at which the first buffer of partial sums begins."""
        return self.tokens * self.x_pitch

    @property
    def partials_words(self) -> int:
        """Words of one buffer of partial sums: float32 [warps, 16, tokens]."""
        return self.warps * 16 * self.tokens

    @property
    def squares_start(self) -> int:
        """Word at which the sums of squares begin."""
        return self.partials_start + 2 * self.partials_words

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA."""
        return 4 * (self.squares_start + self.warps * self.tokens)


def choose_plan(layout: PrepackedLayout, tokens: int, chip: Chip) -> GemvPlan:
    """The tiling of a projection, as measured on an H100 with the shapes of Llama 3.2 3B (docs/cuda-backend.md).

    The least split-K that still makes four CTAs of 8 warps per SM, and no more than there are groups. A warp loads its
    part of a tile at once if that is three groups at most. One CTA of 16 warps stages x once where two of 8 warps stage
    it twice: with one token that pays from two tiles per SM on; with more tokens, from one tile per SM on.
    """
    sms, cvt = chip.sms, chip.fp8_converter == "cvt"
    split_k = 1
    while split_k < 8 and 2 * split_k <= layout.groups and layout.tiles * split_k < 8 * 4 * sms:
        split_k *= 2
    groups_per_warp = -(-layout.groups // split_k)
    at_once = groups_per_warp if groups_per_warp <= 3 else 2
    if tokens > 1:
        # Before sm_89 FP8 is converted with integer instructions, which leaves registers for one group.
        in_flight = at_once if cvt else 1
        if layout.tiles >= sms:
            return GemvPlan(layout, tokens, warps=16, split_k=split_k, groups_in_flight=in_flight, ctas_per_sm=1)
        return GemvPlan(layout, tokens, split_k=split_k, groups_in_flight=in_flight)
    if split_k == 1:
        return GemvPlan(layout, split_k=split_k)
    if layout.tiles >= 2 * sms:
        return GemvPlan(layout, warps=16, split_k=split_k, groups_in_flight=at_once, ctas_per_sm=1)
    max_in_flight = 4 if cvt else 2
    return GemvPlan(
        layout, split_k=split_k, groups_in_flight=groups_per_warp if groups_per_warp <= 3 else max_in_flight
    )
