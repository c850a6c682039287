"""Tables of cosines and sines: which layer reads which, and what is in them.

Layers differ in RoPE by their table only. A layer without RoPE has one of ones and zeros, which leaves q and k as they
are; so has a pair that partial RoPE does not rotate.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.geometry import ModelGeometry, rope_inverse_frequencies
from numba_atomflow.ops.rope import rope_table

GLOBAL, LOCAL, NONE = "rope", "rope_local", "rope_none"  # prefixes of buffer names

Table = NDArray[np.float32]  # [positions, head_dim / 2]


def table_of_layer(geometry: ModelGeometry, layer: int) -> str:
    """The table of a layer: "rope", "rope_local" or "rope_none"."""
    if layer in geometry.no_rope_layers:
        return NONE
    return LOCAL if geometry.local_rope_theta is not None and layer in geometry.sliding_layers else GLOBAL


def tables_of(geometry: ModelGeometry) -> tuple[str, ...]:
    """The tables that a model's layers read."""
    used = {table_of_layer(geometry, layer) for layer in range(geometry.layers)}
    return tuple(name for name in (GLOBAL, LOCAL, NONE) if name in used)


def rope_tables(geometry: ModelGeometry, positions: int, length: int | None = None) -> Iterator[tuple[str, Table]]:
    """The buffers ``<table>.cosines`` and ``<table>.sines`` of a model, one at a time.

    Args:
        geometry: of the model.
        positions: rows of a table.
        length: longest sequence, on which some scalings depend; `positions` if None.
    """
    length = positions if length is None else length
    for name in tables_of(geometry):
        frequencies, magnitude = np.zeros(geometry.head_dim // 2), 1.0
        if name != NONE:
            frequencies = rope_inverse_frequencies(geometry, length, local=name == LOCAL)
        if name == GLOBAL and geometry.rope_scaling is not None:
            magnitude = geometry.rope_scaling.magnitude
        rotated = (geometry.rotary_dim or geometry.head_dim) // 2
        cosines, sines = rope_table(frequencies, positions)
        for table in (cosines, sines):
            table[:, :rotated] *= np.float32(magnitude)
        yield f"{name}.cosines", cosines
        yield f"{name}.sines", sines
