"""Which drafter a generation has."""

from numba_atomflow.errors import OptionError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.sampling import Speculate
from numba_atomflow.speculation.draft_model import DraftModel, ModelDrafter
from numba_atomflow.speculation.drafter import Drafter
from numba_atomflow.speculation.prompt_lookup import PromptLookup
from numba_atomflow.speculation.step_cost import StepCost


def choose_drafter(
    speculate: Speculate, drafter: Drafter | None, obstacle: str, cost: StepCost, draft: DraftModel | None = None
) -> Drafter | None:
    """The caller's drafter, or the engine's draft model or prompt lookup where the backend can check several tokens; or
    None.

    Args:
        speculate: of the `SamplingParams`; "auto" is "lookup" here.
        drafter: the caller's, if there is one.
        obstacle: why the backend cannot check several tokens, as a clause; "" if it can.
        cost: of the engine's steps.
        draft: the engine's draft model, if it has one.

    Raises:
        OptionError: speculation is required, and the backend cannot; or there is a drafter, and speculation is off; or
            the drafter has not the methods of one; or the engine has no draft model, where that is required.
    """
    if drafter is not None and not _is_drafter(drafter):
        raise OptionError(f"drafter is {quote(drafter)}; it must be an object with methods `propose` and `observe`.")
    if drafter is not None and speculate == "off":
        raise OptionError('There is a drafter, but speculate is "off"; leave one of them out.')
    required = drafter is not None or speculate in ("lookup", "draft")
    if required and obstacle:
        what = f'speculate is "{speculate}"' if drafter is None else "There is a drafter"
        raise OptionError(
            f"{what}, but this backend cannot check several tokens in one step, because {obstacle}; leave it out."
        )
    if drafter is not None:
        return drafter
    if speculate == "draft":
        if draft is None:
            raise OptionError(
                'speculate is "draft", but the engine has no draft model; load it with one (draft, or --draft MODEL).'
            )
        return ModelDrafter(draft)
    return None if speculate == "off" or obstacle else PromptLookup(cost)


def _is_drafter(value: object) -> bool:
    methods = (getattr(value, name, None) for name in ("propose", "observe"))
    return not isinstance(value, type) and all(map(callable, methods))
