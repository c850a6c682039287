"""Prefill attention on a GPU, against float64, over many numbers of tokens and starts (as prefill_sweeps.py)."""

from dataclasses import dataclass

import numpy as np
from kernel_cases import generator, poisoned, relative_error, within
from numpy.typing import NDArray
from prefill_sweep_sizes import GQA_RATIOS, HEAD_DIMS, LONG_CAPACITY, SHORT, SHORT_CAPACITY, whole

from numba_atomflow.ops.cuda.attention.prefill import PrefillAttentionArguments, prefill_attention_kernel
from numba_atomflow.ops.cuda.attention.prefill_plan import PrefillAttentionPlan, choose_prefill_attention_plan
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.ops.cuda.runtime.spec import Planned

STARTS = (0, 1, 63, 64, 129, 1000)


@dataclass(frozen=True)
class AttentionSweep:
    """Attention of a geometry, over many numbers of tokens and starts."""

    head_dim: int
    ratio: int
    kv_heads: int = 2
    capacity: int = SHORT_CAPACITY
    few: bool = False  # the plan of chunks of few tokens

    def __str__(self) -> str:
        return f"{self.heads}of{self.kv_heads}x{self.head_dim}{'-few' * self.few}"

    @property
    def heads(self) -> int:
        return self.ratio * self.kv_heads

    def plan(self, chip: Chip) -> PrefillAttentionPlan:
        tiles = ActivationTiles(self.heads * self.head_dim, self.capacity)
        return choose_prefill_attention_plan(self.heads, self.kv_heads, self.head_dim, tiles, chip, few=self.few)

    def planned(self, chip: Chip) -> Planned:
        name = "attention_few" if self.few else "attention_chunk"
        return prefill_attention_kernel(name, self.plan(chip), chip.dependent_launch)


ATTENTIONS = (
    *(AttentionSweep(head_dim, ratio) for head_dim in HEAD_DIMS for ratio in GQA_RATIOS),
    *(AttentionSweep(head_dim, 3, few=True) for head_dim in (64, 128)),
)
CHUNKS = (*((tokens, 0) for tokens in SHORT), *((tokens, start) for tokens in (1, 16, 70, 129) for start in STARTS))
LONG_ATTENTIONS = tuple(AttentionSweep(head_dim, 3, capacity=LONG_CAPACITY) for head_dim in (64, 128))
LONG_CHUNKS = ((2048, 0), (2048, 2048), (4097, 0), (511, 7000))


def check_attention_chunk(sweep: AttentionSweep, tokens: int, position: int, chip: Chip) -> None:
    """Relative L2 1e-3 of all, 2e-3 of a row; NaN and loud noise behind the last token change no bit."""
    from device_launch import launch_planned

    rng = generator(sweep.head_dim, sweep.ratio, tokens, position)
    plan, planned, length = sweep.plan(chip), sweep.planned(chip), position + tokens
    q = np.full((-(-tokens // 128) * 128, sweep.heads * sweep.head_dim), np.nan, np.float16)
    q[:tokens] = rng.standard_normal((tokens, q.shape[1])) * 2
    stored = rng.standard_normal((2, length + 130, sweep.kv_heads * sweep.head_dim)).astype(np.float16)
    rows = np.unique([0, tokens - 1, *rng.choice(tokens, min(tokens, 64), replace=False)])
    results = []
    for noise in (np.nan, 60000.0):
        stored[:, length:] = noise
        out = poisoned(plan.out.words, dtype=np.uint32)
        bits = [np.ascontiguousarray(array).view(np.uint16) for array in (q, stored[0], stored[1])]
        scalars = np.array([position], np.int64), np.array([tokens], np.int64)
        counters = np.zeros(plan.counters, np.uint32)
        arguments = PrefillAttentionArguments(*bits, *scalars, poisoned(plan.partials), counters, out)
        launch_planned(planned, arguments, plan.ctas(tokens))
        assert not counters.any(), "a counter does not stand at zero for the next launch"
        width = plan.out.in_features
        unpacked = whole(plan.out).unpack(out)
        assert np.isnan(unpacked[tokens:]).all(), "wrote beyond the chunk's tokens"
        assert np.isnan(unpacked[:, width:]).all(), "wrote the padding of K"
        results.append(unpacked[:, :width])
    np.testing.assert_array_equal(*results)
    got = results[0][rows]
    expected = attend_rows(q, stored[0], stored[1], position + rows, rows, sweep.head_dim)
    within("prefill attention", relative_error(got, expected), 1e-3)
    worst = max(relative_error(mine, wanted) for mine, wanted in zip(got, expected, strict=True))
    within("a row of prefill attention", worst, 2e-3)


def attend_rows(
    q: NDArray[np.float16],
    keys: NDArray[np.float16],
    values: NDArray[np.float16],
    positions: NDArray[np.int64],
    rows: NDArray[np.int64],
    head_dim: int,
) -> NDArray[np.float64]:
    """Causal attention in float64 of some rows of q, which have these positions: [rows, heads * head_dim]."""
    visible = int(positions.max()) + 1
    k, v = (array[:visible].astype(np.float64).reshape(visible, -1, head_dim) for array in (keys, values))
    queries = q[rows].astype(np.float64).reshape(len(rows), k.shape[1], -1, head_dim)
    scores = np.einsum("tkgd,skd->tkgs", queries, k, optimize=True) / np.sqrt(head_dim)
    ahead = np.arange(visible)[None, :] > positions[:, None]
    scores = np.where(ahead[:, None, None, :], -np.inf, scores)
    weight = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = np.einsum("tkgs,skd->tkgd", weight, v, optimize=True) / weight.sum(axis=-1)[..., None]
    return np.asarray(mixed.reshape(len(rows), -1))
