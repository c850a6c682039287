"""Several conversations on one KV cache: what a request would overwrite is kept in host memory, and put back later."""

from collections.abc import Sequence

from numba_atomflow.engine import Engine
from numba_atomflow.state.snapshot import KvSnapshot, bytes_per_token

LEAST_TOKENS = 32  # fewer are computed again as fast as they are copied


class Prefixes:
    """Snapshots of the KV cache, the least recently used of which are dropped.

    Args:
        engine: used by the thread that generates, as this object is.
        most_bytes: of all snapshots together; 0: none are kept.
    """

    def __init__(self, engine: Engine, most_bytes: int) -> None:
        self._engine, self._most_bytes = engine, most_bytes
        self._kept: list[KvSnapshot] = []  # the most recently used last

    @property
    def nbytes(self) -> int:
        """Bytes of all snapshots."""
        return sum(snapshot.nbytes for snapshot in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def prepare(self, prompt: Sequence[int]) -> int:
        """Make the KV cache begin with as much of a prompt as is known, and keep what that overwrites.

        Returns:
            Tokens of the prompt in the KV cache, at most all but one.
        """
        held = self._engine.token_ids
        shared = common_length(held, prompt)
        best = max(self._kept, key=lambda snapshot: common_length(snapshot.token_ids, prompt), default=None)
        known = 0 if best is None else common_length(best.token_ids, prompt)
        if len(held) - shared >= LEAST_TOKENS:
            self._keep(held)
        if best is None or known - shared < LEAST_TOKENS:
            return min(shared, len(prompt) - 1)
        self._engine.restore(best.prefix(known))
        if best in self._kept:
            self._kept.remove(best)
            self._kept.append(best)
        return min(known, len(prompt) - 1)

    def _keep(self, held: list[int]) -> None:
        """Take a snapshot of the KV cache, in place of those of its beginnings, unless one holds all of it."""
        if any(common_length(snapshot.token_ids, held) == len(held) for snapshot in self._kept):
            return
        self._kept = [kept for kept in self._kept if common_length(kept.token_ids, held) < kept.position]
        size = bytes_per_token(self._engine.backend) * len(held)
        if size > self._most_bytes:
            return
        while self._kept and self.nbytes + size > self._most_bytes:
            del self._kept[0]
        self._kept.append(self._engine.snapshot())


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    for number, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return number
    return min(len(first), len(second))
