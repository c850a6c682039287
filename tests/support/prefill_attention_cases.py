"""Prefill attention against the float64 reference: in the simulator at tiny shapes, on a GPU at real ones."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from kernel_cases import generator, launch, poisoned, relative_error, within
from numpy.typing import NDArray

from numba_atomflow.ops.attention import NO_WINDOW, attend_reference
from numba_atomflow.ops.cuda.attention.prefill import PrefillAttentionArguments, prefill_attention_kernel
from numba_atomflow.ops.cuda.attention.prefill_plan import PrefillAttentionPlan
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles


@dataclass(frozen=True)
class PrefillAttentionCase:
    """A chunk of `count` tokens that begins at `position`."""

    head_dim: int
    heads: int
    kv_heads: int
    position: int
    count: int
    query_tile: int
    key_block: int
    stages: int = 1
    instructions: Literal["wgmma", "mma"] = "mma"
    sms: int = 1
    bits: int = 16  # of the output
    window: int = 0
    soft_cap: float = 0.0

    @property
    def plan(self) -> PrefillAttentionPlan:
        tiles = ActivationTiles(self.heads * self.head_dim, (self.count + 7) // 8 * 8 + 8, self.bits)
        return PrefillAttentionPlan(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            out=tiles,
            instructions=self.instructions,
            query_tile=self.query_tile,
            key_block=self.key_block,
            stages=self.stages,
            sms=self.sms,
            window=self.window,
            soft_cap=self.soft_cap,
        )


@lru_cache(maxsize=2)
def _kernel(plan: PrefillAttentionPlan) -> Any:
    return prefill_attention_kernel("prefill_attention", plan, dependent=False).spec.make()


def check_prefill_attention(case: PrefillAttentionCase) -> None:
    """Relative L2 error 1e-3 against float64, and of every row 2e-3; NaN and loud noise behind the last token of q and
    of the cache change no bit; nothing is written beyond the chunk's tokens.
    """
    rng = generator(case.head_dim, case.heads, case.position, case.count)
    plan, length = case.plan, case.position + case.count
    q = poisoned(case.count + 3, case.heads * case.head_dim, dtype=np.float16)
    q[: case.count] = rng.standard_normal((case.count, case.heads * case.head_dim)) * 2
    q[: case.count : 3] *= 10  # one key decides such rows: their running max rises by hundreds
    cache = rng.standard_normal((2, length + 5, case.kv_heads * case.head_dim)).astype(np.float16)
    scalars = np.array([case.position], np.int64), np.array([case.count], np.int64)
    counters, results = np.zeros(plan.counters, np.uint32), []
    for noise in (np.nan, 60000.0):
        q[case.count :], cache[:, length:] = noise, noise
        out = poisoned(plan.out.words, dtype=np.uint32)
        bits = (array.reshape(-1).view(np.uint16) for array in (q, cache[0], cache[1]))
        partials = poisoned(plan.partials)
        arguments = PrefillAttentionArguments(*bits, *scalars, partials, counters, out)
        launch(_kernel(plan), plan.ctas(case.count), plan.threads, plan.shared_bytes, arguments)
        assert not counters.any(), "a counter does not stand at zero for the next launch"
        rows = plan.out.unpack(out)
        assert np.isnan(rows[case.count :]).all(), "wrote beyond the chunk's tokens"
        results.append(rows[: case.count])
    np.testing.assert_array_equal(results[0], results[1])
    exact = (array.astype(np.float64) for array in (q[: case.count], cache[0], cache[1]))
    expected = attend_reference(*exact, case.position, case.head_dim, case.window or NO_WINDOW, case.soft_cap)
    if case.bits == 8:
        check_rounded(plan, out, expected)
        return
    within("prefill attention", relative_error(results[0], expected), 1e-3)
    for got, wanted in zip(results[0], expected, strict=True):
        within("a row of prefill attention", relative_error(got, wanted), 2e-3)


def check_rounded(plan: PrefillAttentionPlan, words: NDArray[np.uint32], expected: NDArray[np.float64]) -> None:
    """FP8 tiles: every head's scale to 2e-3, and every value off by half a step at most, beside what float16 may be."""
    tokens = len(expected)
    scales = words[plan.out.scales_start :].view(np.float32).reshape(plan.heads, -1).T[:tokens]
    largest = np.abs(expected).reshape(tokens, plan.heads, -1).max(axis=2)
    np.testing.assert_allclose(scales, largest / 448, rtol=2e-3)
    largest = np.repeat(largest, plan.head_dim, axis=1)
    half_step = np.maximum(np.abs(expected) / 16, largest / 448 * 2.0**-10)
    assert (np.abs(plan.out.unpack(words)[:tokens] - expected) <= half_step * 1.01 + 2e-3 * largest).all()
