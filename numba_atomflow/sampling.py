"""Sampling of the next token from logits, and its parameters.

Filters apply in this order, as in Hugging Face's ``generate``: repetition penalty, temperature, top-k, top-p, min-p.
The random generator is counter-based: the same seed, prompt and options give the same text, and any draw can be
computed without the earlier ones.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.errors import OptionError, non_finite_logits
from numba_atomflow.files.untrusted import quote
from numba_atomflow.utils.arguments import one_of, real_number, truth_value, whole_number

if TYPE_CHECKING:
    from numba_atomflow.constraints.base import Constraint, ConstraintState

Speculate = Literal["auto", "off", "lookup", "draft"]

_MASK = (1 << 64) - 1
_LARGEST_TOP_K = (1 << 63) - 1
MOST_LOGPROBS = 20  # of a position, as in OpenAI's interface
LEAST_TEMPERATURE = 1e-30  # lower bound: logits divided by it stay finite


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters and stop conditions.

    Attributes:
        temperature: 0 is greedy decoding; 1 samples the model's own distribution. Positive values below
            `LEAST_TEMPERATURE` are raised to it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probabilities reach p; the token that crosses the
            threshold is kept. 1 keeps all.
        min_p: remove tokens with a probability below min_p times the largest one; 0 keeps all.
        repetition_penalty: logits of tokens already in the context are divided by it if positive, multiplied if
            negative; 1 has no effect. Source: Keskar et al., "CTRL" (2019).
        seed: of the random draws; None: a new one for every generation. The same seed gives the same text if the KV
            cache is in the same state (`Engine.reset`): a prefix hit changes the number of tokens per step, and with it
            the rounding on a GPU. CPU and GPU diverge after a few sampled tokens, because their logits differ by
            rounding (docs/cuda-backend.md).
        max_tokens: maximum number of generated tokens; None: to the end of the context.
        stop: stop strings, which are not part of the text.
        ignore_eos: do not stop at an EOS token (for benchmarks).
        constraint: what the reply must satisfy, such as `constraints.JsonSchema`; tokens that it does not allow are
            removed before the other filters, and EOS is allowed exactly where the reply is complete. A reply that ends
            at `max_tokens`, at the end of the context or at a stop string may be incomplete.
        logprobs: for each generated token its log-probability and those of this many most likely ones, 0 to 20, by the
            model's own distribution: before penalty, temperature and filters. None: none. Without speculation a GPU
            computes them in the step, and copies no logits.
        prompt_logprobs: the same for each token of the prompt but the first, which nothing predicts. All of the prompt
            is computed then, whatever the KV cache holds of it.
        speculate: speculative decoding, which changes the speed and nothing else (docs/speculation.md). "lookup": what
            followed the last tokens earlier in prompt or reply is proposed, and several tokens are checked in one step;
            "draft": what the engine's draft model would generate is; "off": a step for each token; "auto": "draft" if
            the engine has a draft model, else "lookup" on the CPU and "off" on a GPU.

    None means an option's default. Numbers may be Python's or NumPy's; they are converted to Python's, and `stop` to a
    tuple.

    Raises:
        OptionError: a value is of another type, or outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    constraint: "Constraint | None" = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    speculate: Speculate = "auto"

    def __post_init__(self) -> None:
        for field in fields(self):
            self._set(field.name, _converted(field.name, getattr(self, field.name), field.default))
        checks = (
            (0.0 <= self.temperature <= 100.0, "temperature", "between 0 (greedy) and 100"),
            (0 <= self.top_k <= _LARGEST_TOP_K, "top_k", "0 (all tokens) or a number of tokens below 2^63"),
            (0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1"),
            (0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1"),
            (0.01 <= self.repetition_penalty <= 100.0, "repetition_penalty", "between 0.01 and 100"),
            (self.seed is None or 0 <= self.seed <= _MASK, "seed", "between 0 and 2^64 - 1"),
            (self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1"),
            (one_of(self.speculate, get_args(Speculate)), "speculate", '"auto", "off", "lookup" or "draft"'),
            *(
                (
                    number is None or 0 <= number <= MOST_LOGPROBS,
                    name,
                    f"between 0 and {MOST_LOGPROBS}",
                )
                for name, number in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs))
            ),
        )
        for valid, name, allowed in checks:
            if not valid:
                raise OptionError(f"{name} is {quote(getattr(self, name))}; it must be {allowed}.")
        if self.ignore_eos and self.constraint is not None:
            raise OptionError("ignore_eos lets a reply go on after its end, which a constraint forbids; leave one out.")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether decoding is greedy."""
        return self.temperature == 0.0 or self.top_k == 1


def _converted(name: str, value: object, default: object) -> object:
    """An option's value, converted to its type."""
    if value is None:
        return default
    if name in ("top_k", "seed", "max_tokens", "logprobs", "prompt_logprobs"):
        return whole_number(name, value)
    if name == "ignore_eos":
        return truth_value(name, value)
    if name == "constraint":
        return _constraint(value)
    if name == "speculate":
        return str(value) if isinstance(value, str) else value
    return _stop_strings(value) if name == "stop" else real_number(name, value)


def _constraint(value: object) -> object:
    if isinstance(value, type) or not callable(getattr(value, "start", None)):
        raise OptionError(
            f"constraint is {quote(value)}; it must be an object with a method `start`, such as JsonSchema(...)."
        )
    return value


def _stop_strings(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    message = f"stop is {quote(value)}; it must be a string, or a list of strings."
    if not isinstance(value, Iterable) or isinstance(value, bytes | Mapping):
        raise OptionError(message)
    try:
        texts = tuple(str(text) if isinstance(text, str) else text for text in value)  # NumPy's are subclasses
    except TypeError:  # a zero-dimensional array is not iterable
        raise OptionError(message) from None
    if not all(isinstance(text, str) and text for text in texts):
        raise OptionError("stop holds an empty string, or a value that is not a string; give at least one character.")
    return texts


def uniform(seed: int, counter: int) -> float:
    """Draw number `counter` of the stream `seed`: in [0, 1), 53 bits.

    The SplitMix64 finaliser applied to a Weyl sequence: integer arithmetic only, the same on every backend. Source:
    Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (2014).
    """
    z = (seed + (counter + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return float((z ^ (z >> 31)) >> 11) * 2.0**-53


def penalise(logits: NDArray[np.float32], seen: NDArray[np.bool_], penalty: float) -> NDArray[np.float32]:
    """Logits [V] after the repetition penalty of the tokens in `seen` [V]; overflow gives infinity, as on a GPU."""
    if penalty == 1.0:
        return logits
    with np.errstate(over="ignore"):
        penalised = np.where(logits > 0, logits / np.float32(penalty), logits * np.float32(penalty))
    return np.where(seen, penalised, logits)


def accepted_tokens(tokens: Sequence[int], most_likely: Callable[[int], int]) -> list[int]:
    """Greedy decoding over proposed tokens: those that are accepted, and the token after them.

    Args:
        tokens: the last token of the text, and those that are proposed after it.
        most_likely: gives the most likely token after number i of them; not asked for any after a rejected one.
    """
    chosen = [most_likely(0)]
    while len(chosen) < len(tokens) and tokens[len(chosen)] == chosen[-1]:
        chosen.append(most_likely(len(chosen)))
    return chosen


def most_likely_token(logits: NDArray[np.float32]) -> int:
    """The most likely token by logits [V].

    Raises:
        CheckpointError: the logits hold a NaN or an infinity.
    """
    best = int(np.argmax(logits))  # a NaN, if there is one
    if not np.isfinite(logits[best]):
        raise non_finite_logits()
    return best


def candidates(logits: NDArray[np.float32], params: SamplingParams) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Tokens that may be drawn and their probabilities.

    With a filter, in descending order of probability (ties: lower id first); only the part of the vocabulary that may
    pass is sorted. Without a filter, all tokens in order of their ids.
    """
    scaled = (logits - np.float64(logits.max())) / max(params.temperature, LEAST_TEMPERATURE)
    weights = np.exp(scaled)
    has_top_k = 0 < params.top_k < len(scaled)
    if has_top_k:
        threshold = np.partition(scaled, -params.top_k)[-params.top_k]
        tokens = _sorted_prefix(scaled, np.flatnonzero(scaled >= threshold))[: params.top_k]
    elif params.top_p < 1.0 or params.min_p > 0.0:
        tokens = _nucleus_candidates(scaled, weights, params)
    else:
        tokens = np.arange(len(scaled))
    total = weights[tokens].sum() if has_top_k else weights.sum()
    probabilities = weights[tokens] / total
    if params.top_p < 1.0:
        mass_before = np.cumsum(probabilities) - probabilities  # exclusive: the token that crosses top_p stays
        inside = mass_before < params.top_p
        tokens, probabilities = tokens[inside], probabilities[inside]
    if params.min_p > 0.0:
        likely = probabilities >= params.min_p * probabilities.max()
        tokens, probabilities = tokens[likely], probabilities[likely]
    return tokens, probabilities / probabilities.sum()


def _sorted_prefix(scaled: NDArray[np.float64], tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """`tokens` (ascending), most likely first."""
    return tokens[np.argsort(-scaled[tokens], kind="stable")]


def _nucleus_candidates(
    scaled: NDArray[np.float64], weights: NDArray[np.float64], params: SamplingParams
) -> NDArray[np.int64]:
    """The most likely tokens, sorted: a superset of those that top-p and min-p keep."""
    total = weights.sum()
    for size in (256, 4096):
        if size >= len(scaled):
            break
        threshold = np.partition(scaled, -size)[-size]
        inside = np.flatnonzero(scaled >= threshold)
        enough_mass = params.top_p < 1.0 and weights[inside].sum() >= params.top_p * total
        below_min_p = params.min_p > 0.0 and np.exp(threshold) < params.min_p
        if enough_mass or below_min_p:
            return _sorted_prefix(scaled, inside)
    return _sorted_prefix(scaled, np.arange(len(scaled)))


class Sampler:
    """Samples the tokens of one generation.

    Attributes:
        seed: of the draws; 0 if nothing is drawn and none was given.
        seen: bool [V], the tokens in the context; [0] without a repetition penalty. draws: random numbers used so far.
        constraint_seconds: spent in the constraint so far.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocabulary: int,
        context: Sequence[int],
        constraint: "ConstraintState | None" = None,
    ) -> None:
        self.params = params
        self._constraint = constraint
        self.constraint_seconds = 0.0
        self.seed = params.seed or 0
        if params.seed is None and not params.greedy:
            self.seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
        self.draws = 0
        self._penalised = params.repetition_penalty != 1.0
        self.seen = np.zeros(vocabulary if self._penalised else 0, np.bool_)
        self._see(context)

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token, from logits float32 [V].

        Raises:
            CheckpointError: the logits hold a NaN or an infinity, or would after the repetition penalty.
        """
        logits = penalise(logits, self.seen, self.params.repetition_penalty)
        best = most_likely_token(logits)
        allowed = self._allowed(len(logits))
        if allowed is not None:
            logits = logits[allowed]
            best = int(np.argmax(logits))
        token = best if self.params.greedy else self._draw(logits)
        if allowed is not None:
            token = int(allowed[token])
        self._see(token)
        self._accept(token)
        return token

    def note(self, token: int) -> None:
        """Take note of a token that a device has sampled with these parameters, without a constraint."""
        self.draws += not self.params.greedy
        self._see(token)

    def _see(self, tokens: int | Sequence[int]) -> None:
        if self._penalised:
            self.seen[np.asarray(tokens, np.int64)] = True

    def _allowed(self, vocabulary: int) -> NDArray[np.int64] | None:
        """The tokens that the constraint allows, in ascending order; None: all.

        Raises:
            OptionError: there are none.
        """
        if self._constraint is None:
            return None
        started = time.perf_counter()
        mask = self._constraint.allowed()
        tokens = None if mask is None else tokens_of(mask, vocabulary)
        self.constraint_seconds += time.perf_counter() - started
        if tokens is not None and not len(tokens):
            raise OptionError("The constraint allows no token here; allow EOS where a reply may end.")
        return tokens

    def _accept(self, token: int) -> None:
        if self._constraint is not None:
            started = time.perf_counter()
            self._constraint.accept(token)
            self.constraint_seconds += time.perf_counter() - started

    def _draw(self, logits: NDArray[np.float32]) -> int:
        """A draw from the distribution of `logits`, as an index into them."""
        tokens, probabilities = candidates(logits, self.params)
        draw = uniform(self.seed, self.draws)
        self.draws += 1
        index = int(np.searchsorted(np.cumsum(probabilities), draw, side="right"))
        return int(tokens[min(index, len(tokens) - 1)])


def tokens_of(mask: NDArray[np.uint32], vocabulary: int) -> NDArray[np.int64]:
    """The tokens below `vocabulary` whose bit is set in a mask, uint32 [ceil(vocabulary / 32)]: bit i % 32 of word
    i // 32 for token i.
    """
    words = np.asarray(mask, "<u4")
    if words.shape != (-(-vocabulary // 32),):
        raise OptionError(
            f"The constraint's mask has the shape {words.shape}; a vocabulary of {vocabulary} tokens needs "
            f"({-(-vocabulary // 32)},)."
        )
    bits = np.unpackbits(words.view(np.uint8), count=vocabulary, bitorder="little")
    return np.flatnonzero(bits.view(np.bool_))  # three times as fast as of numbers
