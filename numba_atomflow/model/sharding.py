"""Tensor parallelism as data: which rows of a checkpoint each of several GPUs (a rank) has.

Every projection is divided by its output rows, so that each row's sum is computed by one rank, in the order of one GPU:

- q, k and v, and their bias, by key/value heads, with the query heads that share them; the KV cache likewise.
- gate and up by units of the MLP, o and down by elements of the residual stream.
- the LM head, and the embedding, by tokens of the vocabulary, in whole tiles of 16: the last rank may have fewer.
- norms are on every rank.
"""

from dataclasses import dataclass, replace

from numba_atomflow.errors import OptionError
from numba_atomflow.geometry import ModelGeometry

MAX_RANKS = 8  # GPUs that exchange directly: those of one machine
TILE_ROWS = 16  # rows that a tensor core instruction computes together
_SWIGLU_ROWS = 8  # units of the MLP in a tile: each has a row of gate and one of up


@dataclass(frozen=True)
class Sharding:
    """How a model is divided among ranks.

    Raises:
        OptionError: it cannot be divided evenly.
    """

    geometry: ModelGeometry
    ranks: int

    def __post_init__(self) -> None:
        check_ranks(self.ranks)
        obstacle = _obstacle(self.geometry, self.ranks)
        if obstacle:
            possible = [n for n in range(2, MAX_RANKS + 1) if _obstacle(self.geometry, n) is None]
            advice = " or ".join(f"--gpus {n}" for n in (1, *possible))
            raise OptionError(f"{self.ranks} GPUs cannot share this model evenly, because {obstacle}; use {advice}.")

    @property
    def hidden_rows(self) -> int:
        """Elements of the residual stream that a rank computes."""
        return self.geometry.hidden // self.ranks

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the LM head and of the embedding that a rank has room for; all but the last use them."""
        return _vocabulary_rows(self.geometry, self.ranks)

    @property
    def rank_geometry(self) -> ModelGeometry:
        """The sizes of what a rank keeps to itself: its heads, its KV cache, its units of the MLP."""
        g, n = self.geometry, self.ranks
        return replace(g, heads=g.heads // n, kv_heads=g.kv_heads // n, ffn=g.ffn // n)

    def rows(self, part: str, rank: int) -> tuple[slice, ...]:
        """The rows that a rank has of a part of the checkpoint, in the order in which it has them.

        Args:
            part: of the checkpoint, such as ``layer.3.qkv`` or ``embedding``.
        """
        g, n = self.geometry, self.ranks
        match part.rpartition(".")[2]:
            case "qkv" | "qkv_bias":
                q, kv = g.q_dim // n, g.kv_dim // n
                starts = (0, q), (g.q_dim, kv), (g.q_dim + g.kv_dim, kv)
                return tuple(slice(start + rank * rows, start + (rank + 1) * rows) for start, rows in starts)
            case "gate_up":
                units = g.ffn // n
                return tuple(slice(start + rank * units, start + (rank + 1) * units) for start in (0, g.ffn))
            case "o" | "down":
                return (slice(rank * self.hidden_rows, (rank + 1) * self.hidden_rows),)
            case "embedding" | "vocabulary":
                first, last = (min(i * self.vocabulary_rows, g.vocabulary) for i in (rank, rank + 1))
                return (slice(first, last),)
            case name if name.endswith("_norm"):
                return (slice(None),)
        raise ValueError(f"{part} is no part of a model")


def check_ranks(ranks: int) -> None:
    """Raises:
    OptionError: no model can be divided among so many GPUs.
    """
    if not 2 <= ranks <= MAX_RANKS:
        raise OptionError(f"--gpus is {ranks}; a model can be divided among 2 to {MAX_RANKS} GPUs.")


def _obstacle(geometry: ModelGeometry, ranks: int) -> str | None:
    """Why a model cannot be divided among so many ranks, as a clause; None if it can."""
    g = geometry
    if g.kv_heads % ranks:
        return f"it has {g.kv_heads} key/value heads"
    if g.hidden % (ranks * TILE_ROWS):
        return f"its hidden size, {g.hidden}, is no multiple of {ranks * TILE_ROWS}"
    if g.ffn % (ranks * _SWIGLU_ROWS):
        return f"its MLP's size, {g.ffn}, is no multiple of {ranks * _SWIGLU_ROWS}"
    if (ranks - 1) * _vocabulary_rows(g, ranks) >= g.vocabulary:
        return f"its vocabulary has {g.vocabulary} tokens"
    return None


def _vocabulary_rows(geometry: ModelGeometry, ranks: int) -> int:
    tiles = -(-geometry.vocabulary // TILE_ROWS)
    return -(-tiles // ranks) * TILE_ROWS
