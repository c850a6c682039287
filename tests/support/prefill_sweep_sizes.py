"""Sizes at which the kernels of prefill steps are checked on a GPU, and the padding of their outputs."""

from dataclasses import replace

from numba_atomflow.ops.cuda.layout.activations import ActivationTiles

SHORT = (*range(1, 71), 127, 128, 129, 511)
LONG = (511, 2048, 4097)
SHORT_CAPACITY, LONG_CAPACITY = 768, 4352
HEAD_DIMS, GQA_RATIOS = (64, 80, 96, 128), (1, 3, 4, 8)


def whole(tiles: ActivationTiles) -> ActivationTiles:
    """The same memory, with the padding of K as elements."""
    return replace(tiles, in_features=tiles.blocks * tiles.block_elements)
