"""Costs of steps that do not depend on the clock, for tests of how many tokens are proposed."""

from numba_atomflow.speculation.step_cost import StepCost


class UnmeasuredCost(StepCost):
    """What is expected before anything is measured."""

    def observe(self, tokens: int, seconds: float) -> None:
        pass
