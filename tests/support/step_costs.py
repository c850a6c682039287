"""Costs of steps that do not depend on the clock, for tests of how many tokens are proposed."""

from numba_atomflow import Engine
from numba_atomflow.speculation.draft_cost import DraftCost
from numba_atomflow.speculation.draft_model import DraftModel
from numba_atomflow.speculation.step_cost import StepCost


class UnmeasuredCost(StepCost):
    """What is expected before anything is measured."""

    def observe(self, tokens: int, seconds: float) -> None:
        pass


class KnownCost(UnmeasuredCost):
    """The same, but that a step of one token counts as measured."""

    single_seconds = 0.01


class CheapDraft(DraftCost):
    """A draft model whose time is next to nothing."""

    def __init__(self) -> None:
        super().__init__(expected_ratio=0.01)

    def observe_proposal(self, tokens: int, seconds: float) -> None:
        pass

    def observe_feeding(self, tokens: int, seconds: float) -> None:
        pass


def with_cheap_draft(target: Engine, draft: Engine) -> Engine:
    """The target, empty, with a draft model that seems to cost nothing."""
    target.reset()
    target.use_draft(draft)
    target._draft_model = DraftModel(draft, target.geometry.vocabulary, KnownCost(), 0.01)
    target._draft_model.cost = CheapDraft()
    return target
