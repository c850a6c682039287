"""Perplexity of a model on a text and, with a reference, its divergence from another model.

A sliding window of `context` tokens advances by `stride` tokens and scores only its new tokens: every token is scored
once, and all but those of the first window with at least context - stride tokens before them. Perplexity is exp of the
mean negative log-likelihood in nats per token; bits per byte does not depend on the tokenizer.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.engine import Engine
from numba_atomflow.errors import OptionError, SourceError, TextError, non_finite_logits
from numba_atomflow.files.untrusted import quote
from numba_atomflow.utils.arguments import whole_number
from numba_atomflow.utils.progress import Progress

DEFAULT_CONTEXT = 1024
_LARGEST_EXPONENT = math.log(np.finfo(np.float64).max)
_ROWS_AT_ONCE = 128  # positions whose log-probabilities are in memory at a time

Logits = Callable[[Sequence[int]], NDArray[np.float32]]  # of every position [T, V]


@dataclass(frozen=True)
class Divergence:
    """Divergence of the model from a reference, over the scored positions.

    Attributes:
        reference_perplexity: of the reference.
        mean_kl: KL(reference || model) of the next-token distributions, in nats per token.
        top1: share of positions at which the most likely token is the same.
    """

    reference_perplexity: float
    mean_kl: float
    top1: float


@dataclass(frozen=True)
class Perplexity:
    """Results.

    Attributes:
        perplexity: per token; infinite above the range of float64.
        bits_per_byte: of the text in UTF-8.
        tokens: scored tokens.
        context, stride: of the windows, in tokens.
        tokens_per_second: tokens computed per second; those of overlapping windows count each time.
        divergence: from the reference, if there is one.
    """

    perplexity: float
    bits_per_byte: float
    tokens: int
    context: int
    stride: int
    tokens_per_second: float
    divergence: Divergence | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def choose_windows(max_positions: int, context: int | None, stride: int | None) -> tuple[int, int]:
    """Context and stride in tokens: by default 1,024 (or what the model has) and half of it.

    Raises:
        OptionError: one is out of range.
    """
    context = min(DEFAULT_CONTEXT, max_positions) if context is None else whole_number("context", context)
    if max_positions < 2:
        raise OptionError(
            "The model's context is a single token, and perplexity needs two or more; give another model."
        )
    if not 2 <= context <= max_positions:
        raise OptionError(f"context is {quote(context)}; this model allows 2 to {max_positions} tokens.")
    stride = max(1, context // 2) if stride is None else whole_number("stride", stride)
    if not 1 <= stride < context:
        raise OptionError(f"stride is {quote(stride)}; it must be from 1 to {context - 1}, below the context.")
    return context, stride


def measure(
    engine: Engine,
    text: str,
    context: int | None = None,
    stride: int | None = None,
    reference: Logits | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a text.

    Args:
        engine: with a KV cache of at least `context` positions, which is overwritten.
        text: at least two tokens.
        context: tokens of a window, a BOS included.
        stride: new tokens of each window.
        reference: returns another model's logits for the tokens of a window.
        progress: called with tokens scored and tokens in all.

    Raises:
        OptionError: context or stride is out of range.
        TextError: the text is too short, or the model has no tokenizer.
        CheckpointError, SourceError: the logits of the model, or of the reference, contain NaN or Inf.
    """
    context, stride = choose_windows(engine.max_seq_len, context, stride)
    bos = engine.text.encode("")[:1]  # a BOS, if the model has one; some tokenizers append an EOS
    tokens = engine.text.encode(text, add_special=False)
    unscored = 0 if bos else 1  # without a BOS, the first token is not predicted
    if len(tokens) <= unscored:
        raise TextError("The text is too short to be measured; give at least two tokens.")
    totals, computed_tokens, seconds = np.zeros(4), 0, 0.0
    for start, stop, first in _windows(len(tokens), context - len(bos), stride, unscored):
        if progress:
            progress("scoring", first, len(tokens))
        window = [*bos, *tokens[start:stop]]
        reference_logits = reference(window) if reference else None
        if reference_logits is not None and not np.isfinite(reference_logits).all():
            raise SourceError("The reference's logits contain NaN or Inf: its weights are damaged; get them again.")
        engine.reset()
        offset = len(bos) - start  # from an index into `tokens` to one into the window
        for row in range(0, len(window), _ROWS_AT_ONCE):
            started = time.perf_counter()
            piece = window[row : row + _ROWS_AT_ONCE]
            logits = engine.feed(piece, all_logits=True)
            seconds += time.perf_counter() - started
            if not np.isfinite(logits).all():
                raise non_finite_logits()
            # Row i predicts the token at position i + 1 of the window.
            targets = [t for t in range(max(first, row + 1 - offset), stop) if t + offset - 1 < row + len(piece)]
            if targets:
                rows = np.array(targets) + offset - 1
                expected = np.array([tokens[t] for t in targets])
                log_p = _log_softmax(logits[rows - row])
                totals += _score(
                    log_p, expected, None if reference_logits is None else _log_softmax(reference_logits[rows])
                )
        computed_tokens += len(window)
    scored = len(tokens) - unscored
    text_bytes = len(text.encode()) - len(engine.text.decode(tokens[:unscored], skip_special=False).encode())
    loss, reference_loss, divergence, top1 = (float(total) / scored for total in totals)
    return Perplexity(
        perplexity=_exp(loss),
        bits_per_byte=loss * scored / math.log(2) / max(text_bytes, 1),
        tokens=scored,
        context=context,
        stride=stride,
        tokens_per_second=computed_tokens / seconds,
        divergence=Divergence(_exp(reference_loss), divergence, top1) if reference else None,
    )


def _exp(loss: float) -> float:
    """e^loss; infinite where `math.exp` raises OverflowError, above 709."""
    return math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf


def _windows(tokens: int, width: int, stride: int, first: int) -> Iterator[tuple[int, int, int]]:
    """Start and stop of each window, and its first scored token."""
    stop = min(width, tokens)
    yield 0, stop, first
    while stop < tokens:
        first, stop = stop, min(stop + stride, tokens)
        yield max(0, stop - width), stop, first


def _score(
    log_p: NDArray[np.float64], expected: NDArray[np.int64], reference_log_p: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """Sums over n positions: loss, the reference's loss, KL, top-1 agreements. Log-probabilities are [n, V]."""
    rows = np.arange(len(expected))
    loss = -log_p[rows, expected].sum()
    if reference_log_p is None:
        return np.array([loss, 0.0, 0.0, 0.0])
    reference_loss = -reference_log_p[rows, expected].sum()
    divergence = (np.exp(reference_log_p) * (reference_log_p - log_p)).sum()
    top1 = np.count_nonzero(log_p.argmax(axis=1) == reference_log_p.argmax(axis=1))
    return np.array([loss, reference_loss, divergence, top1])


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities [n, V] of finite logits, in float64: their differences are small beside float32's rounding."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
