"""Steps of several tokens on several ranks in numba's simulator, against single steps of one GPU: the same bits."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from kernel_cases import poisoned
from numpy.typing import NDArray
from persistent_cases import SPARE, Memory, PersistentCase
from rank_cases import RankCase, part_of
from wide_cases import STEPS, WideCase, draw, stale_mailbox

from numba_atomflow.ops.cuda.persistent import wide_kernel
from numba_atomflow.ops.cuda.persistent.rank import peers_of
from numba_atomflow.ops.cuda.persistent.schedule import CTA_THREADS, DOWN, PersistentShape
from numba_atomflow.ops.cuda.persistent.wide_rank import RankWideArguments
from numba_atomflow.ops.cuda.persistent.wide_vectors import ABSENT
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("all_blocks_at_once")]

SideBySide = Callable[..., AbstractContextManager[None]]
CASES = (
    # Two columns that are one split each, and two that share the keys of two splits.
    (WideCase(PersistentCase(32, 32, 2, 2, 32, position=223, layers=2, sms=4), 4), 2),
    (WideCase(PersistentCase(64, 64, 4, 4, 32, position=3, vocabulary=56, sms=4), 2), 4),
    (WideCase(PersistentCase(32, 32, 4, 2, 32, position=2, sms=2, qkv_bias=True, qk_norm=True), 2), 2),
    # The tiles of `down` in halves along K, of which a CTA of each rank passes sums on.
    (WideCase(PersistentCase(32, 1024, 2, 2, 32, position=1, sms=4), 8), 2),
    (WideCase(PersistentCase(32, 1024, 2, 2, 32, position=1, sms=4), 4, k_halves=True), 2),
)
SMALL = WideCase(PersistentCase(32, 32, 2, 2, 32, position=1, sms=2), 2)  # for two ranks


@lru_cache(maxsize=2)
def kernel_of(shape: PersistentShape) -> Any:
    return wide_kernel.make_wide(shape)


class _Rank:
    """A rank's memory of steps of several tokens."""

    def __init__(self, case: WideCase, part: RankCase, whole: Memory, number: int) -> None:
        shape = part.part_of(case.shape)
        assert shape.refusal() is None
        model = part_of(whole.model, part, number)
        self.shape, self.table, self.weights = shape, model.table, np.concatenate(model.words)
        heads = slice(number * part.kv_dim, (number + 1) * part.kv_dim)
        self.cache = np.ascontiguousarray(whole.cache[..., heads])
        self.mailbox = stale_mailbox(shape)
        self.vectors = np.full((2, shape.layers, shape.vector_words), ABSENT, np.uint32)
        self.vectors[(STEPS + 1) % 2] = 0  # of the step before
        self.logits = poisoned(case.columns * case.model.vocabulary + SPARE)
        self.best, self.choices = np.full(case.columns, LOWEST_KEY, np.int64), np.zeros(case.columns, np.uint64)
        self.steps, self.position = np.array([STEPS, 0], np.int64), np.array([case.model.position], np.int64)
        self.fault = np.zeros(1, np.int32)


class Ranks:
    """The memories of all ranks, and that of one GPU."""

    def __init__(self, case: WideCase, ranks: int, side_by_side: SideBySide, steps: int = 1) -> None:
        self.case, self._side_by_side = case, side_by_side
        self.one, self.tokens = draw(case, steps)
        part = RankCase.of(case.model, ranks)
        self.ranks = [_Rank(case, part, self.one, number) for number in range(ranks)]

    def run(self, *, steps: int = 1, advance: int = 0) -> None:
        """So many steps on every rank, each rank as soon as it is ready."""
        with self._side_by_side(steps * len(self.ranks), len(self.ranks)):
            for number, rank in [*enumerate(self.ranks)] * steps:
                shape, cache = rank.shape, rank.cache.reshape(-1)
                past = cache if steps > 1 else cache.copy()  # what a step writes, it need not read
                others = [other for other in self.ranks if other is not rank]
                kernel_of(shape)[shape.sms, CTA_THREADS, 0, shape.dynamic_shared_bytes](
                    RankWideArguments(
                        weights=rank.weights,
                        table=rank.table,
                        cache16=cache.view(np.uint16),
                        cache=past.view(np.uint32),
                        mailbox=rank.mailbox,
                        vectors=rank.vectors.reshape(-1),
                        tokens=self.tokens,
                        position=rank.position,
                        steps=rank.steps,
                        cosines=self.one.cosines.reshape(-1),
                        sines=self.one.sines.reshape(-1),
                        logits=rank.logits,
                        best=rank.best,
                        choices=rank.choices,
                        fault=rank.fault,
                        timestamps=np.zeros(1, np.int64),
                        **peers_of("mailbox", [other.mailbox for other in others], rank.mailbox),
                        **peers_of("vectors", [other.vectors.reshape(-1) for other in others], rank.mailbox),
                        **peers_of("logits", [other.logits for other in others], rank.logits),
                        kv_stride=rank.cache[0, 0].size,
                        first_op=0,
                        end_op=shape.ops,
                        rank=number,
                        advance=advance,
                    )
                )

    @property
    def written(self) -> NDArray[np.float16]:
        """The cache of all ranks together."""
        return np.concatenate([rank.cache for rank in self.ranks], axis=-1)

    def check(self, *, steps: int = 1) -> None:
        """The last of the steps has given each column the bits of a step of one token on one GPU, on every rank; of 8,
        four are compared.
        """
        case, one, written = self.case, self.one, self.written
        first, count = case.model.position + (steps - 1) * case.columns, case.columns * case.model.vocabulary
        assert np.isnan(written[:, :, first + case.columns :]).all()
        for column in sorted({0, 1, case.columns // 2, case.columns - 1}):
            position = first + column
            one.cache[:, :, :position], one.cache[:, :, position:] = written[:, :, :position], np.nan
            one.tokens[0], one.position[0] = self.tokens[column], position
            one.run(0, one.shape.ops)
            assert one.fault[0] == 0
            expected = one.logits[: case.model.vocabulary]
            for number, rank in enumerate(self.ranks):
                row, where = rank.logits[:count].reshape(case.columns, -1)[column], f"column {column}, rank {number}"
                np.testing.assert_array_equal(row.view(np.uint32), expected.view(np.uint32), where)
                assert rank.choices[column] == 1 << 32 | int(expected.argmax())
            rows, single = written[:, :, position], one.cache[:, :, position]
            np.testing.assert_array_equal(rows.view(np.uint16), single.view(np.uint16), f"column {column}")
        for rank in self.ranks:
            assert rank.fault[0] == 0
            assert rank.steps.tolist() == [STEPS + steps, 0]
            assert (rank.best == LOWEST_KEY).all()
            assert (rank.vectors[(STEPS + steps - 1) % 2] != ABSENT).all()
            assert (rank.vectors[(STEPS + steps) % 2] == ABSENT).all(), "the next step would take this one's results"
            assert np.array_equal(rank.logits[count:].view(np.uint32), poisoned(SPARE).view(np.uint32))


@pytest.mark.parametrize(("case", "ranks"), CASES, ids=str)
def test_columns_have_the_bits_of_single_steps_of_one_gpu(case: WideCase, ranks: int, side_by_side: SideBySide) -> None:
    several = Ranks(case, ranks, side_by_side)
    assert several.ranks[0].shape.plans[DOWN].k_halves == (case.model.ffn == 1024)
    several.run()
    several.check()
    assert [rank.position[0] for rank in several.ranks] == [case.model.position] * ranks


def test_a_rank_that_is_ahead_spoils_no_word_of_another(side_by_side: SideBySide) -> None:
    """Three steps of a prompt: each half of the vectors is written, cleared, and written again."""
    several = Ranks(SMALL, 2, side_by_side, steps=3)
    several.run(steps=3, advance=SMALL.columns)
    assert [rank.position[0] for rank in several.ranks] == [SMALL.model.position + 3 * SMALL.columns] * 2
    several.check(steps=3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of what is computed from words that never came
def test_a_rank_that_gives_up_makes_all_give_up(side_by_side: SideBySide, monkeypatch: pytest.MonkeyPatch) -> None:
    several = Ranks(SMALL, 2, side_by_side)
    monkeypatch.setattr(wide_kernel, "SPIN_LIMIT", 2)
    several.ranks[1].steps[0] += 2  # its words have other flags than the others wait for
    kernel_of.cache_clear()
    several.run()
    kernel_of.cache_clear()
    for rank in several.ranks:
        assert rank.fault[0] == 1
        assert rank.choices.tolist() == [1 << 32 | 1 << 31] * SMALL.columns, "token 0, and that it is none"
