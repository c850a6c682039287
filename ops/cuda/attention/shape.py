"""How attention of a decode step is divided among CTAs: split-KV (Flash-Decoding)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionShape:
    """Tiling of attention: a CTA computes one KV head, up to 16 queries and one KV split. Of heads of 192 and more it
    computes half of the outputs only, which another CTA does the other half of: a thread has no registers for all.

    Attributes:
        tokens: of the step, 1 to 8.
        out_width: elements from one token to the next in the output: heads * head_dim, padded for the projection.
        kv_splits: the most CTAs that share a sequence.
        warps: per CTA.
        window: positions that a token attends to, its own included; 0: all.
        soft_cap: c where a score s becomes c tanh(s / c); 0: scores stay as they are.
    """

    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    out_width: int
    kv_splits: int
    warps: int = 8
    window: int = 0
    soft_cap: float = 0.0

    @property
    def threads(self) -> int:
        return self.warps * 32

    @property
    def value_parts(self) -> int:
        """CTAs among which the outputs of a head are divided. Each computes the scores."""
        return 2 if self.head_dim >= 192 and self.head_dim % 32 == 0 else 1

    @property
    def value_dim(self) -> int:
        """Elements of a head's output that a CTA computes."""
        return self.head_dim // self.value_parts

    @property
    def queries(self) -> int:
        """Queries that share a KV head: tokens times the query heads of a group."""
        return self.tokens * self.heads // self.kv_heads

    @property
    def query_tiles(self) -> int:
        return -(-self.queries // 16)

    @property
    def rows(self) -> int:
        """Rows of a query tile that hold queries; the rest of its 16 are padding."""
        return min(self.queries, 16)

    @property
    def work_tiles(self) -> int:
        """Pairs of a KV head and a query tile, for each part of the outputs. Each has a counter of the CTAs that have
        finished it.
        """
        return self.kv_heads * self.query_tiles * self.value_parts

    @property
    def ctas(self) -> int:
        return self.work_tiles * self.kv_splits

    @property
    def partials(self) -> int:
        """Float32 elements of scratch: per CTA, unnormalised outputs [rows, value_dim], then (m, l) [rows, 2]."""
        return self.ctas * self.rows * (self.value_dim + 2)

    @property
    def q_words(self) -> int:
        """32-bit words of Q in shared memory as A fragments: 4 per lane and 16 elements of the head."""
        return self.head_dim // 16 * 128

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: Q; partial outputs and (m, l) of the warps, later (m, l) of the KV splits; a flag."""
        return 4 * (self.q_words + max(self.warps * (self.value_dim + 2), self.kv_splits * 2) * self.rows + 1)


def choose_kv_splits(heads: int, kv_heads: int, tokens: int, sms: int) -> int:
    """KV splits that give about one CTA per SM."""
    query_tiles = -(-tokens * heads // kv_heads // 16)
    return max(1, sms // (kv_heads * query_tiles))
