"""The persistent kernel for several columns against single steps of the kernel for one: every bit of the logits, and of
the keys and values. The same checks in numba's simulator and on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from kernel_cases import generator, launch, poisoned
from numpy.typing import NDArray
from persistent_cases import SPARE, Memory, Model, PersistentCase

from numba_atomflow.ops.cuda.persistent.schedule import CTA_THREADS, PersistentShape
from numba_atomflow.ops.cuda.persistent.wide_kernel import WideArguments, make_wide
from numba_atomflow.ops.cuda.persistent.wide_vectors import ABSENT
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY
from numba_atomflow.ops.rope import rope_table

STEPS = 21845  # completed before, as in `persistent_cases.py`


@dataclass(frozen=True)
class WideCase:
    """A model of `persistent_cases.py`, whose position is that of the first column."""

    model: PersistentCase
    columns: int
    k_halves: bool = False

    @cached_property
    def shape(self) -> PersistentShape:
        """With as many stages as the model's kernel for one column."""
        generous = replace(self.model.shape, columns=self.columns, k_halves=self.k_halves, shared_bytes=1 << 20)
        rest = (1 << 20) - 4 * (generous.stages - self.model.stages) * (generous.stage_words + 4)
        shape = replace(generous, shared_bytes=rest)
        assert shape.stages == self.model.stages
        assert shape.refusal() is None
        return shape


CASES = (
    WideCase(PersistentCase(64, 128, 2, 1, 64, position=0, layers=2), 2),  # from the first token on
    WideCase(PersistentCase(80, 520, 1, 1, 80, position=13, stages=12, fp16_head=True), 4),  # k-tiles of 4 and 1 groups
    WideCase(PersistentCase(64, 72, 2, 1, 32, position=3, qkv_bias=True, qk_norm=True), 2),
)
CASES_OF_MANY_CTAS = (
    # Two columns that are one split each, and two that share the keys of three splits.
    WideCase(PersistentCase(64, 72, 3, 1, 32, position=223, sms=3), 4),
)
LARGE_CASES = (  # minutes in the simulator, where they pass as well
    WideCase(
        PersistentCase(64, 72, 3, 1, 32, position=334, sms=5), 4
    ),  # that share keys, with three splits and with four
    WideCase(PersistentCase(64, 2048, 8, 1, 128, position=5, sms=3), 4),  # 8-row tiles
    WideCase(PersistentCase(64, 1024, 2, 1, 32, position=5, sms=3), 8),  # 8-row tiles for one column, 16 for eight
    WideCase(PersistentCase(1920, 128, 1, 1, 32, position=2), 8),  # inputs whose norms are received in two batches
    WideCase(PersistentCase(64, 2048, 2, 1, 32, position=5, sms=2), 8),  # tiles of `down` in halves along K
    WideCase(PersistentCase(64, 2048, 2, 1, 32, position=5, sms=2), 4, k_halves=True),
    WideCase(PersistentCase(64, 72, 3, 1, 32, position=334, sms=5, qkv_bias=True), 4),
    WideCase(PersistentCase(64, 72, 8, 2, 128, position=300, layers=2, sms=6, qk_norm=True), 8),  # two rounds of heads
    WideCase(PersistentCase(64, 512, 1, 1, 32, position=5), 8),  # early inputs of `down`
)


@lru_cache(maxsize=2)
def _kernel(shape: PersistentShape) -> Any:
    return make_wide(shape)


def check_bits(case: WideCase, columns: Sequence[int] | None = None) -> None:
    """A step of all columns, beside a single step for each of some, or of all: it finds the columns before it in the
    cache, as the step of all has left them.
    """
    memory, tokens = draw(case)
    logits, written = _wide_step(case, memory, tokens)
    assert np.isfinite(logits).all()
    assert np.isfinite(written[:, :, : case.model.position + case.columns]).all()
    assert np.isnan(written[:, :, case.model.position + case.columns :]).all()
    for column in range(case.columns) if columns is None else columns:
        position = case.model.position + column
        memory.cache[:, :, :position] = written[:, :, :position]
        memory.cache[:, :, position:] = np.nan
        memory.tokens[0], memory.position[0] = tokens[column], position
        memory.run(0, memory.shape.ops)
        assert memory.fault[0] == 0
        single = memory.logits[: case.model.vocabulary]
        np.testing.assert_array_equal(logits[column].view(np.uint32), single.view(np.uint32), f"column {column}")
        rows, single_rows = written[:, :, position], memory.cache[:, :, position]
        assert np.array_equal(rows.view(np.uint16), single_rows.view(np.uint16)), f"column {column}: keys and values"


def draw(case: WideCase, steps: int = 1) -> tuple[Memory, NDArray[np.int32]]:
    """A model's memory with room for the columns of so many steps, and their tokens."""
    model = case.model
    rng = generator(model.hidden, model.position, case.columns)
    memory = Memory(model, Model.draw(model, rng), rng)
    positions = model.position + steps * case.columns + 1
    memory.cache = rng.standard_normal((model.layers, 2, positions, model.kv_dim)).astype(np.float16)
    memory.cache[:, :, model.position :] = np.nan
    angles = 10000.0 ** (-np.arange(0, model.head_dim, 2) / model.head_dim)
    memory.cosines, memory.sines = rope_table(angles, positions)
    return memory, rng.integers(model.vocabulary, size=case.columns).astype(np.int32)


def stale_mailbox(shape: PersistentShape) -> NDArray[np.uint64]:
    """A mailbox of NaN, of the step before."""
    before = STEPS * (shape.layers + 1)
    mailbox = np.full(shape.mailbox.end, before << 32 | 0xFFFFFFFF, np.uint64)
    at = shape.mailbox
    for start, end in ((at.residual_in, at.residual_in_exact), (at.residual_mid, at.residual_mid_exact)):
        mailbox[start:end] = (before & 0xFFFF) << 48 | 0xFFFFFFFFFFFF
    return mailbox


def _wide_step(
    case: WideCase, memory: Memory, tokens: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
    """Logits [columns, V], and the cache afterwards; `memory` stays as it is."""
    shape, fault, cache = case.shape, np.zeros(1, np.int32), memory.cache.copy()
    steps = np.array([STEPS, 0], np.int64)
    vectors = np.full((2, case.model.layers, shape.vector_words), ABSENT, np.uint32)
    vectors[(STEPS + 1) % 2] = 0  # of the step before
    logits = poisoned(case.columns * case.model.vocabulary + SPARE)
    best, choices = np.full(case.columns, LOWEST_KEY, np.int64), np.zeros(case.columns, np.uint64)
    arguments = WideArguments(
        weights=memory.weights,
        table=memory.model.table,
        cache16=cache.reshape(-1).view(np.uint16),
        cache=memory.cache.reshape(-1).copy().view(np.uint32),  # what it writes, it need not read
        mailbox=stale_mailbox(shape),
        vectors=vectors.reshape(-1),
        tokens=tokens,
        position=memory.position,
        steps=steps,
        cosines=memory.cosines.reshape(-1),
        sines=memory.sines.reshape(-1),
        logits=logits,
        best=best,
        choices=choices,
        fault=fault,
        timestamps=np.zeros(1, np.int64),
        kv_stride=memory.kv_stride,
        first_op=0,
        end_op=shape.ops,
    )
    launch(_kernel(shape), shape.sms, CTA_THREADS, shape.dynamic_shared_bytes, arguments)
    assert fault[0] == 0
    assert (vectors[STEPS % 2] != ABSENT).all()
    assert (vectors[(STEPS + 1) % 2] == ABSENT).all(), "the next step would take this one's results"
    assert steps.tolist() == [STEPS + 1, 0]
    assert memory.position[0] == case.model.position
    count = case.columns * case.model.vocabulary
    assert np.array_equal(logits[count:].view(np.uint32), poisoned(SPARE).view(np.uint32)), "logits are out of bounds"
    rows = logits[:count].reshape(case.columns, -1)
    assert choices.tolist() == [1 << 32 | int(token) for token in rows.argmax(axis=1)]
    assert (best == LOWEST_KEY).all()
    return rows, cache
