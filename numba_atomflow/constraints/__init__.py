"""Constraints on replies: `SamplingParams(constraint=JsonSchema(...))`.

`Constraint` and `ConstraintState` are what a constraint of one's own implements.
"""

from numba_atomflow.constraints.base import Constraint, ConstraintState
from numba_atomflow.constraints.kinds import Choice, Grammar, JsonObject, JsonSchema, Regex
from numba_atomflow.constraints.reasoning import AfterReasoning
from numba_atomflow.constraints.tools import ToolCalls

__all__ = [
    "AfterReasoning",
    "Choice",
    "Constraint",
    "ConstraintState",
    "Grammar",
    "JsonObject",
    "JsonSchema",
    "Regex",
    "ToolCalls",
]
