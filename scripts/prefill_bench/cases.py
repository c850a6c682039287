"""What is measured: the cases of each part, most wanted first."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from numba_atomflow.utils.stats import Spread

BACK_TO_BACK = "back to back"  # of a part's sides: without a pause before a prompt
PARTS = ("ceilings", "projections", "attention", "ttft", "requests", "decode")
MODELS = ("llama-3.2-3b", "llama-3.1-8b", "llama-3.2-1b")
PATHS = ("gemm", "gemv", "fp8")  # values of --prefill
PEER = "transformers"

PROJECTIONS = ("qkv", "o", "gate_up", "down")
PROJECTION_TOKENS = (512, 2048, 4096, 128, 64, 32, 16)
ATTENTION_TOKENS = (512, 2048, 8192, 32768)
PROMPTS = (512, 4096, 16, 128, 2048, 64, 8192, 32768)
LONGEST_GEMV_PROMPT = 4096  # eight tokens at a time, more would take seconds
REQUESTS = (512, 2048, 8192)
REPLY = 128  # tokens
DEPTHS = (16,)  # of decode steps
LARGEST_ERROR = 2e-3  # relative L2; rounding to float16 is 3e-4, FP8 sums in the tensor cores are 1e-3
MAX_SEQ_LEN = max(PROMPTS) + 2 * REPLY


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        part: one of `PARTS`.
        model: name of a geometry; empty for ceilings.
        subject: a projection, a value of --prefill, or a peer.
        tokens: of a step, or of a prompt; depth of the KV cache for decode.
        variants: measure every tile of a projection, or every plan of attention, not only the chosen one.
    """

    part: str
    model: str = ""
    subject: str = ""
    tokens: int = 0
    variants: bool = False

    @property
    def lab(self) -> str:
        """What measures it: "kernels", "engine" or "peer", each in a process of its own."""
        if self.subject == PEER:
            return "peer"
        return "kernels" if self.part in ("ceilings", "projections", "attention") else "engine"

    @property
    def text(self) -> str:
        """For one line of progress."""
        words = [self.part, self.model, self.subject, str(self.tokens) if self.tokens else ""]
        return " ".join(word for word in words if word)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record."""
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """What a worker has measured in one case.

    Attributes:
        seconds: of every round, by side: "ours", "cuBLAS", "flash", "tile 128" ...; sides of one round are measured
            one after the other, so that ratios of rounds are ratios of the same moment.
        flop: of one run, for rates.
        errors: relative L2 against float64, by side.
        values: other figures by name. notes: facts by name, such as a plan.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    flop: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Self:
        """The inverse of `asdict`; NaN is null in JSON."""
        errors = {side: math.nan if error is None else error for side, error in record.get("errors", {}).items()}
        return cls(**record | {"errors": errors})

    @property
    def wrong(self) -> list[str]:
        """Sides whose results are not those of float64."""
        return [side for side, error in self.errors.items() if not error <= LARGEST_ERROR]

    def spread(self, side: str) -> Spread | None:
        """Seconds of a side."""
        return Spread.of(self.seconds[side]) if self.seconds.get(side) else None

    def ratio(self, side: str, other: str) -> Spread | None:
        """How many times as fast `side` is as `other`, round by round."""
        ours, theirs = self.seconds.get(side), self.seconds.get(other)
        if not ours or not theirs:
            return None
        return Spread.of([b / a for a, b in zip(ours, theirs, strict=True)])


def select(
    parts: Sequence[str],
    models: Collection[str] = MODELS,
    paths: Collection[str] = PATHS,
    subjects: Collection[str] = (),
    tokens: Collection[int] = (),
    *,
    variants: bool = False,
) -> list[Case]:
    """The cases of these parts in the order of measurement.

    Cases of one engine follow each other, whatever their parts, so that it is loaded once; those of peers come last.

    Args:
        subjects: only these projections, paths or peers. tokens: only these numbers of tokens.
        variants: of projections and attention.
    """
    cases = [case for part in parts for case in _cases_of(part, [m for m in MODELS if m in models], paths)]
    cases = [
        replace(case, variants=variants and case.part in ("projections", "attention"))
        for case in cases
        if (not subjects or not case.subject or case.subject in subjects)
        and (not tokens or not case.tokens or case.tokens in tokens)
    ]
    kernels, engines, peers = ([case for case in cases if case.lab == lab] for lab in ("kernels", "engine", "peer"))
    engines.sort(key=lambda case: (PATHS.index(case.subject), MODELS.index(case.model)))
    return kernels + engines + peers


def _cases_of(part: str, models: Sequence[str], paths: Collection[str]) -> Iterator[Case]:
    if part == "ceilings":
        yield Case(part)
        return
    chosen = tuple(path for path in PATHS if path in paths)
    subjects, counts = {
        "projections": (PROJECTIONS, PROJECTION_TOKENS),
        "attention": (("causal",), ATTENTION_TOKENS),
        "ttft": (chosen, PROMPTS),
        "requests": ((*chosen, PEER), REQUESTS),
        "decode": (chosen, DEPTHS),
    }[part]
    for model in models:
        for subject in subjects:
            for tokens in counts:
                if subject != "gemv" or tokens <= LONGEST_GEMV_PROMPT:
                    yield Case(part, model, subject, tokens)
