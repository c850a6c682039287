"""How a GEMM is tiled: rows and tokens of a CTA's tile, pipeline stages, and the schedule of tiles over SMs."""

from dataclasses import dataclass

from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout

TILE_ROWS = 128  # weight rows of a CTA's tile: 8 tiles of 16 of the prepacked layout, one for each consumer warp


@dataclass(frozen=True)
class GemmPlan:
    """The tiling of a projection Y = X W^T of many tokens.

    Attributes:
        layout: of the prepacked weights W [out_features, in_features].
        x: of the tiled activations X [tokens, in_features].
        tokens: that are computed: a multiple of `tile_tokens`, at most the capacity of `x`.
        tile_tokens: of a CTA's tile: N of the tensor core instruction on sm_90 (16, 32, 64, 128 or 256).
        stages: of the pipeline of X tiles in shared memory.
        ctas: grid size; CTAs are persistent.
    """

    layout: PrepackedLayout
    x: ActivationTiles
    tokens: int
    tile_tokens: int
    stages: int
    ctas: int

    @property
    def row_tiles(self) -> int:
        """Tiles of `TILE_ROWS` weight rows."""
        return -(-self.layout.tiles * 16 // TILE_ROWS)

    @property
    def token_tiles(self) -> int:
        return self.tokens // self.tile_tokens

    @property
    def tiles(self) -> int:
        return self.row_tiles * self.token_tiles
