"""How a GEMM is tiled: rows and tokens of a CTA's tile, pipeline stages, and what CTAs that share a tile need."""

from dataclasses import dataclass, replace
from typing import Literal

from numba_atomflow.ops.cuda.layout.activations import BLOCK_BYTES, BLOCK_WORDS, ActivationTiles
from numba_atomflow.ops.cuda.layout.weights import GROUP_WORDS, PrepackedLayout
from numba_atomflow.ops.cuda.runtime.chip import Chip

TILE_ROWS = 128  # weight rows of a CTA's tile: 8 tiles of 16 of the prepacked layout, one for each consumer warp
UNIT = 128  # of K: what the schedule counts in: a group of FP8 weights; two K blocks of float16 activations
SM_90 = (9, 0)
MOST_STAGES = 12
_SHARED_SM_TOKENS = 16  # of a tile, up to which an SM has room for two CTAs
_RING_UNITS, _FEWER_RING_UNITS = 4, 3  # of the ring of weights: up to 128 tokens of a tile; more, or float16 weights
_MMA_STAGES = 8  # of the pipeline with `mma.sync`: four units
_RESERVED_BYTES = 1024  # of shared memory, by the system for each CTA
_MISCELLANEOUS_BYTES = 2048  # of shared memory: alignment, barriers, a flag
MOST_PADDING = 64  # tokens, by which a projection's tiles may exceed the number of tokens
_EPILOGUE_US = 4.0
# Of tiles with FP8 weights: tokens. More than 128 are a multiple of 16, since FP8 activations are multiplied in two
# halves. With every size allowed, the modelled time is 0.2 % less, averaged over presets and buckets; it is 2.2 % more
# without 160, 208 and 224.
_SM_90_TILES = (256, 224, 208, 192, 176, 160, 128, 104, 64, 32, 16, 8)
_SHARED_UNIT_US = 1.0  # of a unit of one of two CTAs on an SM: twice its bytes of weights at 4.4 TB/s
FP8_TILE_WORDS = GROUP_WORDS + 16  # codes and scales of a unit of a prepacked tile, as `weight_copies.py` copies them
FP8_SLOT_WORDS = TILE_ROWS // 16 * FP8_TILE_WORDS  # of all prepacked tiles of a CTA
COPIED_FROM = 64  # tokens of a tile, from which FP8 weights are copied by warps that do nothing else


@dataclass(frozen=True)
class GemmPlan:
    """The tiling of a projection Y = X W^T of many tokens. How many is an argument of the launch.

    Attributes:
        layout: of the prepacked weights W [out_features, in_features].
        x: of the tiled activations X [tokens, in_features].
        tile_tokens: of a CTA's tile: N of the tensor core instruction on sm_90, a multiple of 8 up to 256.
        stages: of the pipeline of X in shared memory; a stage is a K block of `tile_tokens`.
        ctas: grid size; CTAs are persistent.
        fixup_units: a tile is shared by CTAs only if that saves the time of so many units.
        min_units: that a CTA takes at least of a shared tile.
        instructions: of the tensor cores: `wgmma`, or `mma.sync`.
        ring: units of weights for which there is shared memory (`wgmma` with float16 activations).
        resident: CTAs for which an SM has room with `wgmma`. With float16 activations the grid has as many: a
            warpgroup has little to do for the tensor cores between what it does itself, and four warpgroups take turns
            better than two. With FP8 activations it has one per SM; room for two lets those of the next kernel start,
            and prefetch their weights, while those of this one still run (programmatic dependent launch).
    """

    layout: PrepackedLayout
    x: ActivationTiles
    tile_tokens: int
    stages: int
    ctas: int
    fixup_units: int = 0
    min_units: int = 1
    instructions: Literal["wgmma", "mma"] = "wgmma"
    ring: int = 3
    resident: int = 1

    @property
    def row_tiles(self) -> int:
        """Tiles of `TILE_ROWS` weight rows."""
        return -(-self.layout.tiles * 16 // TILE_ROWS)

    @property
    def units(self) -> int:
        """Units along K of a tile."""
        return self.layout.padded_in_features // UNIT

    @property
    def unit_blocks(self) -> int:
        """K blocks of X in a unit."""
        return UNIT // self.x.block_elements

    @property
    def stage_words(self) -> int:
        """32-bit words of a pipeline stage."""
        return self.tile_tokens * BLOCK_WORDS

    @property
    def stage_scales(self) -> int:
        """Float32 scales of a pipeline stage: of FP8 activations."""
        return self.tile_tokens if self.x.bits == 8 else 0

    @property
    def stage_weights(self) -> int:
        """32-bit words of weights of a pipeline stage: with FP8 activations."""
        return FP8_SLOT_WORDS if self.x.bits == 8 else 0

    @property
    def copies_weights(self) -> bool:
        """Whether the ring is filled by warps of the producer's warpgroup (`weight_copies.py`); else the consumers fill
        it themselves (`ring.py`). With FP8 activations there is no ring.
        """
        fp8_weights, wgmma = self.x.bits == 16 and self.layout.format.bits == 8, self.instructions == "wgmma"
        return fp8_weights and wgmma and self.tile_tokens >= COPIED_FROM and self.resident == 1

    @property
    def slot_words(self) -> int:
        """32-bit words of a unit of a prepacked tile in the ring: its codes and its scales. Consumers that copy for
        themselves have two scales for each lane.
        """
        if self.copies_weights:
            return FP8_TILE_WORDS
        scales = 64 if self.layout.format.scaled else 0
        return UNIT * 16 * self.layout.format.bits // 32 + scales

    @property
    def ring_words(self) -> int:
        """32-bit words of the ring."""
        return self.ring * TILE_ROWS // 16 * self.slot_words if self.x.bits == 16 else 0

    @property
    def tile_elements(self) -> int:
        """Sums of a CTA's tile."""
        return TILE_ROWS * self.tile_tokens

    @property
    def partials(self) -> int:
        """Float32 of scratch, 0 between launches: every CTA's part of up to two shared tiles."""
        return 2 * self.ctas * self.tile_elements


def choose_gemm_plan(layout: PrepackedLayout, x: ActivationTiles, tokens: int, chip: Chip) -> GemmPlan:
    """The plan that a model of the time takes for fastest at `tokens`, a multiple of 8 (a bucket).

    Its tiles have room for `MOST_PADDING` tokens more at most, and never for more than x. Plans of different buckets
    are equal if they have the same tiles. FP8 activations need `wgmma` and FP8 weights.
    """
    if x.bits == 8 and (chip.capability != SM_90 or layout.format.bits != 8):
        raise ValueError(f"no GEMM of {layout.format.name} weights and FP8 activations on sm_{chip.capability}")
    most = min(tokens + MOST_PADDING, x.tokens)
    sizes = [size for size in _tile_sizes(layout, x, chip) if -(-tokens // size) * size <= most]
    if not sizes:
        raise ValueError(f"{tokens} tokens do not fit into tiles for at most {most}")
    plans = [gemm_plan(layout, x, size, chip) for size in sizes]
    return min(plans, key=lambda plan: modelled_us(plan, tokens))


def _tile_sizes(layout: PrepackedLayout, x: ActivationTiles, chip: Chip) -> tuple[int, ...]:
    """Tokens of a tile, from which a plan is chosen. Few, since each is a kernel to compile."""
    if chip.capability == SM_90:
        # Registers: more than 128 tokens need FP8 weights, which take half as many.
        return _SM_90_TILES if layout.format.bits == 8 else (128, 104, 64, 32, 16, 8)
    # `ldmatrix` reads 16 tokens. For sm_100 and later the compiler leaves sums of 128 tokens in local memory.
    return (128, 64, 32, 16) if chip.capability < (10, 0) else (64, 32, 16)


def gemm_plan(layout: PrepackedLayout, x: ActivationTiles, tile_tokens: int, chip: Chip) -> GemmPlan:
    """The plan with tiles of so many tokens."""
    if chip.capability != SM_90:
        return mma_plan(layout, x, tile_tokens, chip)
    fp8 = x.bits == 8
    resident = 2 if tile_tokens <= _SHARED_SM_TOKENS and layout.format.bits == 8 else 1
    stage_bytes = tile_tokens * BLOCK_BYTES
    available = (chip.shared_bytes + _RESERVED_BYTES) // resident - _RESERVED_BYTES
    available -= _MISCELLANEOUS_BYTES + stage_bytes  # one more for the epilogue
    if fp8:
        stage_bytes += 4 * tile_tokens + 4 * FP8_SLOT_WORDS  # scales of X, and weights with theirs
    ring = _RING_UNITS if tile_tokens <= 128 and layout.format.bits == 8 else _FEWER_RING_UNITS
    ctas, min_units = (chip.sms, 2) if fp8 or resident == 1 else (resident * chip.sms, 4)
    plan = GemmPlan(layout, x, tile_tokens, 0, ctas, min_units=min_units, ring=ring, resident=resident)
    stages = min(MOST_STAGES, (available - 4 * plan.ring_words) // stage_bytes)
    return replace(plan, stages=stages, fixup_units=round(fixup_us(tile_tokens) / unit_us(plan)))


def mma_plan(layout: PrepackedLayout, x: ActivationTiles, tile_tokens: int, chip: Chip) -> GemmPlan:
    """The plan with tiles of so many tokens, 16 to 128, for `mma.sync`, which every GPU has."""
    unit_bytes, ctas_per_sm = 2 * tile_tokens * BLOCK_BYTES, mma_ctas_per_sm(layout, tile_tokens)
    available = chip.shared_bytes // ctas_per_sm - _MISCELLANEOUS_BYTES - unit_bytes // 2  # for the epilogue
    stages = min(_MMA_STAGES, 2 * (available // unit_bytes))
    plan = GemmPlan(layout, x, tile_tokens, stages, chip.sms * ctas_per_sm, min_units=2, instructions="mma")
    return replace(plan, fixup_units=round(fixup_us(tile_tokens) / unit_us(plan)))


def mma_ctas_per_sm(layout: PrepackedLayout, tile_tokens: int) -> int:
    """CTAs with `mma.sync` for which an SM has registers."""
    return 2 if tile_tokens * layout.format.bits // 8 <= 32 else 1


def unit_us(plan: GemmPlan) -> float:
    """Time of a unit of a tile, measured on an H200 (docs/prompts.md): what a warpgroup does between its products, less
    if it need not copy weights, and its own products; or those of both warpgroups. With FP8 activations: bytes from L2,
    or for few tokens those of the weights from memory. Two CTAs on an SM have a time of their own.
    """
    tokens = plan.tile_tokens
    if plan.x.bits == 8:
        return max(0.48 + tokens * 0.0005, 0.29 + tokens * 0.003)
    if plan.copies_weights:
        return max(0.57 + tokens * 0.003, tokens * 0.0058)
    return max(0.62 + tokens * 0.003, tokens * 0.006)


def fixup_us(tile_tokens: int) -> float:
    """What a tile takes longer if several CTAs share it: partial sums to and from L2. Measured likewise."""
    return 0.5 + 0.058 * tile_tokens


def modelled_us(plan: GemmPlan, tokens: int) -> float:
    """Time of the projection: waves of whole tiles, and what is left over by whole or by shared tiles."""
    waves, rest = divmod(plan.row_tiles * -(-tokens // plan.tile_tokens), plan.ctas)
    unit = unit_us(plan)
    if plan.resident > 1 and plan.x.bits == 16:
        unit = max(unit, _SHARED_UNIT_US)
    us = waves * (plan.units * unit + _EPILOGUE_US)
    if rest:
        shared = plan.units * rest / plan.ctas * unit + fixup_us(plan.tile_tokens)
        us += _EPILOGUE_US + min(plan.units * unit, shared)
    return us
