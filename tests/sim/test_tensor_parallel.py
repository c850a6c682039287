"""The persistent kernel of several ranks in numba's CUDA simulator, against that of one GPU: the same bits.

A case's model is drawn once (tests/support/persistent_cases.py); each rank has its rows of it, and a memory of its own.
The CTAs of all ranks run side by side, as they do on GPUs that wait for each other.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from kernel_cases import generator
from numpy.typing import NDArray
from persistent_cases import COUNTED, PENALTY, STEPS, Memory, PersistentCase, whole_step
from rank_cases import RankCase, part_of

from numba_atomflow.ops.cuda.persistent import kernel as persistent
from numba_atomflow.ops.cuda.persistent.rank import APART, GREEDY, PROMPT, SAMPLED, RankArguments, peers_of
from numba_atomflow.ops.cuda.persistent.schedule import CTA_THREADS, PersistentShape
from numba_atomflow.ops.cuda.persistent.trace import EVENTS
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY, NAN_KEY

SideBySide = Callable[..., AbstractContextManager[None]]
Ready = Callable[[PersistentCase, int], "Ranks"]

CASES = (
    (PersistentCase(32, 32, 2, 2, 32, position=290, layers=2, sms=4), 2),  # two KV splits per head
    (PersistentCase(64, 32, 4, 4, 32, position=3, vocabulary=56, sms=4), 4),  # the last rank has half a tile of logits
    (PersistentCase(32, 32, 2, 2, 32, position=2, sms=2, qkv_bias=True, qk_norm=True), 2),
)
SMALL = PersistentCase(32, 32, 2, 2, 32, position=1, sms=2)  # for two ranks


@lru_cache(maxsize=2)
def kernel_of(shape: PersistentShape) -> Any:
    return persistent.make_persistent(shape)


class Ranks:
    """The memories of all ranks, with the past and the token of a memory of the whole model."""

    def __init__(self, whole: Memory, case: RankCase, side_by_side: SideBySide) -> None:
        self.whole, self.case, self._side_by_side = whole, case, side_by_side
        self.memories = []
        for rank in range(case.ranks):
            memory = Memory(case, part_of(whole.model, case, rank), generator(case.ffn, case.position))
            heads = slice(rank * case.kv_dim, (rank + 1) * case.kv_dim)
            memory.cache = np.ascontiguousarray(whole.past[..., heads])
            memory.tokens[:] = memory.token = whole.token
            memory.seen, memory.seen_bits = whole.seen.copy(), whole.seen_bits.copy()
            self.memories.append(memory)

    def run(self, first: int, last: int, ending: int, *, steps_back: int = 0, steps: int = 1) -> None:
        """Ops first .. last - 1 on every rank; so many times, each rank as soon as it is ready."""
        with self._side_by_side(steps * self.case.ranks, self.case.ranks):
            for rank, memory in [*enumerate(self.memories)] * steps:
                shape, cache = memory.shape, memory.cache.reshape(-1)
                past = cache if steps > 1 else cache.copy()  # what a step writes, it need not read
                others = [other for other in self.memories if other is not memory]
                kernel_of(shape)[shape.sms, CTA_THREADS, 0, shape.dynamic_shared_bytes](
                    RankArguments(
                        weights=memory.weights,
                        table=memory.model.table,
                        cache16=cache.view(np.uint16),
                        cache=past.view(np.uint32),
                        mailbox=memory.mailbox,
                        tokens=memory.tokens,
                        position=memory.position,
                        steps=memory.steps,
                        cosines=memory.cosines.reshape(-1),
                        sines=memory.sines.reshape(-1),
                        residual=memory.residual,
                        x_norm=memory.x_norm,
                        final_x_norm=memory.final_x_norm,
                        q=memory.q,
                        attn_out=memory.attn_out,
                        intermediate=memory.intermediate,
                        logits=memory.logits,
                        seen=memory.seen_bits,
                        options=np.array([0.0, 0.0, 1.0, 0.0, PENALTY]),
                        best=memory.best,
                        token_ring=memory.ring,
                        tokens_posted=memory.count,
                        fault=memory.fault,
                        timestamps=np.zeros(shape.sms * shape.ops * EVENTS, np.int64),
                        **peers_of("mailbox", [other.mailbox for other in others], memory.mailbox),
                        **peers_of("logits", [other.logits for other in others], memory.logits),
                        kv_stride=memory.kv_stride,
                        first_op=first,
                        end_op=last,
                        rank=rank,
                        steps_back=steps_back,
                        ending=ending,
                    )
                )

    def together(self, name: str, size: int) -> NDArray[Any]:
        """The ranks' parts of a view, one after the other."""
        return np.concatenate([getattr(memory, name)[: size // self.case.ranks] for memory in self.memories])


@pytest.fixture
def ready(all_blocks_at_once: None, side_by_side: SideBySide) -> Callable[[PersistentCase, int], Ranks]:
    """Ranks before a step, and the whole model's memory after it."""
    return lambda case, ranks: Ranks(whole_step(case), RankCase.of(case, ranks), side_by_side)


def check_bits(ranks: Ranks, *, logits: bool = True) -> None:
    """The ranks have computed what one GPU has."""
    whole, case = ranks.whole, ranks.case.model
    for name, size in (("q", case.q_dim), ("attn_out", case.q_dim // 2), ("intermediate", case.ffn // 2)):
        np.testing.assert_array_equal(ranks.together(name, size), getattr(whole, name)[:size], err_msg=name)
    rows = case.hidden // ranks.case.ranks
    for rank, memory in enumerate(ranks.memories):
        own = slice(rank * rows, (rank + 1) * rows)
        np.testing.assert_array_equal(memory.residual[own], whole.residual[own], err_msg="residual")
        heads = slice(rank * ranks.case.kv_dim, (rank + 1) * ranks.case.kv_dim)
        np.testing.assert_array_equal(memory.cache.view(np.uint16), whole.cache[..., heads].view(np.uint16))
        if logits:
            np.testing.assert_array_equal(memory.logits[: case.vocabulary], whole.logits[: case.vocabulary])
        assert memory.fault[0] == 0
        assert memory.steps.tolist() == [STEPS + 1, 0]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "ranks"), CASES, ids=str)
def test_a_step_has_the_bits_of_one_gpu(ready: Ready, case: PersistentCase, ranks: int) -> None:
    several = ready(case, ranks)
    several.run(0, several.case.shape.ops, SAMPLED)
    check_bits(several)
    for memory in several.memories:
        assert memory.best[0] == several.whole.best[0], "the arg-max of all ranks, for the kernels that follow"
        assert memory.position[0] == case.position
        assert memory.count[0] == COUNTED


@pytest.mark.slow
def test_a_rank_that_is_ahead_spoils_no_word_of_another(ready: Ready) -> None:
    """Two greedy steps: a rank's next one begins when its own last one has ended, whatever the others do."""
    case, several = SMALL, ready(SMALL, 2)
    alone = Memory(case, several.whole.model, generator(case.ffn, case.position))
    for _ in range(2):
        alone.run(0, alone.shape.ops, greedy=True)
    several.run(0, several.case.shape.ops, GREEDY, steps=2)
    for memory in several.memories:
        assert memory.fault[0] == 0
        assert memory.best[0] == LOWEST_KEY
        assert memory.steps.tolist() == [STEPS + 2, 0]
        assert memory.position.tolist() == alone.position.tolist() == [case.position + 2]
        assert memory.tokens.tolist() == alone.tokens.tolist()
        np.testing.assert_array_equal(memory.ring, alone.ring)
        np.testing.assert_array_equal(memory.logits[: case.vocabulary], alone.logits[: case.vocabulary])


def test_a_prompts_token_has_no_logits_until_they_are_asked_for(ready: Ready) -> None:
    case, several = SMALL, ready(SMALL, 2)
    head = several.case.shape.ops - 1
    several.run(0, head, PROMPT)
    check_bits(several, logits=False)
    for memory in several.memories:
        assert np.isnan(memory.logits[: case.vocabulary]).all()
        assert memory.position[0] == case.position + 1
        assert memory.count[0] == COUNTED
    several.run(head, head + 1, APART, steps_back=1)
    check_bits(several)


@pytest.mark.slow
def test_a_rank_that_gives_up_makes_all_give_up(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank starts in the middle of the step; what is before it never arrives."""
    several = ready(SMALL, 2)
    monkeypatch.setattr(persistent, "SPIN_LIMIT", 2)
    several.memories[1].steps[0] += 1  # its words have other flags than the others wait for
    several.run(0, several.case.shape.ops, SAMPLED)
    for memory in several.memories:
        assert memory.fault[0] == 1
        assert memory.best[0] == NAN_KEY
