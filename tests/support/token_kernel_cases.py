"""The kernels around the layers - embedding, arg-max, sampling, bookkeeping - against their references on the CPU."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from kernel_cases import fp16_weights, generator, launch, poisoned, weights
from numpy.typing import NDArray
from sample_reference import device_token, logits_of

from numba_atomflow.logprobs import log_sum_exp, token_logprobs
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout, prepack_fp16_reference, prepack_reference
from numba_atomflow.ops.cuda.token import advance, argmax, embedding, logprobs, sample
from numba_atomflow.ops.cuda.token.order import ID_BITS, ID_MASK, LOWEST_KEY
from numba_atomflow.ops.cuda.token.sample_layout import SampleLayout
from numba_atomflow.ops.embedding import embed_reference
from numba_atomflow.ops.formats import FP8_E4M3_BITS, FP16
from numba_atomflow.sampling import SamplingParams, candidates, penalise, uniform

EMBEDDINGS = (
    (PrepackedLayout(40, 130), 3),  # neither fills its tiles
    (PrepackedLayout(33, 576, format=FP8_E4M3_BITS), 1),
    (PrepackedLayout(40, 130, format=FP16), 3),
    (PrepackedLayout(33, 576, k_tile=4), 2),  # k-tiles of 4 groups and of 1
    (PrepackedLayout(20, 1100, format=FP8_E4M3_BITS, k_tile=3), 1),  # three equal k-tiles, not a power of two
    (PrepackedLayout(40, 300, format=FP16, k_tile=4), 3),
)


def check_embedding(layout: PrepackedLayout, count: int) -> None:
    """Bit for bit: a code times its scale, rounded once."""
    rng = generator(layout.out_features, count)
    if layout.format.bits == 16:
        stored = fp16_weights(layout, rng)
        table, words = stored.astype(np.float64), prepack_fp16_reference(stored, layout)
    else:
        codes, scales = weights(layout, rng)
        table = embed_reference(np.arange(layout.out_features), codes, scales)
        words = prepack_reference(codes, scales, layout)
    tokens = rng.integers(0, layout.out_features, count).astype(np.int32)
    tokens[0] = layout.out_features - 1
    residual = poisoned(count * layout.in_features)
    kernel = embedding.make_embed(layout, count)
    arguments = embedding.EmbedArguments(weights=words, tokens=tokens, residual=residual)
    launch(kernel, embedding.embed_ctas(layout, count), embedding.THREADS, 0, arguments)
    expected = table[tokens].astype(np.float32)
    np.testing.assert_array_equal(residual.reshape(count, -1), expected)


# --- arg-max and sampling ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenCase:
    """Options of a draw, and what the logits look like."""

    logits: str = "normal"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    penalty: float = 1.0
    draws: int = 3

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(self.temperature, self.top_k, self.top_p, self.min_p, self.penalty)

    @property
    def options(self) -> NDArray[np.float64]:
        return np.array([self.temperature, self.top_k, self.top_p, self.min_p, self.penalty], np.float64)


VOCABULARY = 300  # no power of two; ten words of the bitmap, the last one not full
ARGMAXES = (
    TokenCase(),
    TokenCase(penalty=1.7),
    TokenCase("negative", penalty=1.7),
    TokenCase("ties"),
    TokenCase("signed zeros"),
    TokenCase("not a number"),
    TokenCase("infinite"),
)
SAMPLES = (
    TokenCase(),  # no filter: in the order of ids
    TokenCase(temperature=0.3, penalty=1.5),
    TokenCase(top_k=7),
    TokenCase("ties", top_k=7),
    TokenCase("equal", top_p=0.5),
    TokenCase(top_p=0.8),
    TokenCase(min_p=0.1),
    TokenCase(temperature=2.0, top_k=40, top_p=0.9, min_p=0.05, penalty=1.2),
    TokenCase("wide", temperature=3.0, top_p=0.95),
    TokenCase(top_k=5000, top_p=0.7),  # more than there are tokens
    TokenCase(top_p=1e-9),  # the most likely token alone
    TokenCase(temperature=20.0, top_p=0.9),  # bins of a few tokens, which are listed
    TokenCase("ties", temperature=20.0, top_k=100, top_p=0.8),  # and narrowed down, at last by their ids
    TokenCase("wide", temperature=100.0, top_k=250, penalty=1.3, draws=6),
    TokenCase(temperature=0.0),
    TokenCase(top_k=1),
    TokenCase("minus infinity", top_p=0.9),
    TokenCase("nothing", temperature=0.5),
    TokenCase("nothing", top_k=9, min_p=0.1),
)


def make_logits(kind: str, rng: np.random.Generator) -> NDArray[np.float32]:
    logits = (rng.standard_normal(VOCABULARY) * 3).astype(np.float32)
    if kind == "negative":
        logits -= np.float32(20.0)
    elif kind == "ties":
        logits = np.round(logits)
    elif kind == "equal":
        logits[:] = 1.25
    elif kind == "wide":
        logits *= 20
    elif kind == "signed zeros":
        logits = np.where(logits > 0, np.float32(-0.0), logits)
        logits[rng.integers(VOCABULARY // 2, VOCABULARY)] = 0.0  # not larger than the -0 before it
    elif kind == "not a number":
        logits[[40, 200]] = np.nan
        logits[41] = np.inf
    elif kind == "infinite":
        logits[[99, 7]] = np.inf
    elif kind == "minus infinity":
        logits[::3] = -np.inf
    elif kind == "nothing":  # the CPU refuses such logits
        logits[:] = -np.inf
    return logits


def bitmap(seen: NDArray[np.bool_]) -> NDArray[np.uint32]:
    bits = np.packbits(seen, bitorder="little")
    return np.pad(bits, (0, -len(bits) % 4)).view(np.uint32)


def run_argmax(logits: NDArray[np.float32], seen: NDArray[np.bool_], case: TokenCase) -> NDArray[np.int64]:
    best = np.array([LOWEST_KEY], np.int64)
    arguments = argmax.ArgmaxArguments(logits=logits, seen=bitmap(seen), options=case.options, best=best)
    launch(argmax.make_argmax(len(logits)), 1, argmax.THREADS, 0, arguments)
    return best


def check_argmax(case: TokenCase) -> None:
    """The very token of np.argmax: the lowest id wins a tie, and NaN wins."""
    rng = generator(3)
    logits, seen = make_logits(case.logits, rng), rng.random(VOCABULARY) < 0.3
    best = run_argmax(logits, seen, case)
    expected = int(np.argmax(penalise(logits, seen, case.penalty)))
    assert ID_MASK - (int(best[0]) & ID_MASK) == expected


def expected_token(logits: NDArray[np.float32], params: SamplingParams, seed: int, counter: int) -> int:
    if params.greedy:
        return int(np.argmax(logits))
    tokens, probabilities = candidates(logits, params)
    index = int(np.searchsorted(np.cumsum(probabilities), uniform(seed, counter), side="right"))
    return int(tokens[min(index, len(tokens) - 1)])


def check_sample(case: TokenCase, threads: int = 64, bins: int = 64, capacity: int = 8, ctas: int = 3) -> None:
    """The tokens of `numba_atomflow.sampling` for the same seed and counter.

    Few bins and a short list: most draws must narrow a bin down. What the CTAs add up is zero again after each.
    """
    rng = generator(4)
    seed = int(rng.integers(0, 2**63)) * 2 + 1  # beyond the range of int64
    kernel = sample.make_sample(VOCABULARY, threads=threads, bins=bins, capacity=capacity)
    layout = SampleLayout(bins, capacity)
    sums = np.zeros(layout.sums_words, np.int64)
    for draw in range(case.draws):
        logits, seen = make_logits(case.logits, rng), rng.random(VOCABULARY) < 0.3
        best = run_argmax(logits, seen, case)
        state, token = np.array([seed, draw], np.uint64), np.array([-1], np.int32)
        arguments = sample.SampleArguments(logits, bitmap(seen), case.options, state, best, sums, token)
        launch(kernel, ctas, threads, layout.shared_bytes, arguments)
        assert not sums.any()
        nothing = case.logits == "nothing"
        expected = 0 if nothing else expected_token(penalise(logits, seen, case.penalty), case.params, seed, draw)
        assert token[0] == expected, f"draw {draw}"
        assert state.tolist() == [seed, draw + (not case.params.greedy and not nothing)]


LOGPROBS = ("normal", "negative", "ties", "equal", "wide", "signed zeros", "minus infinity", "few threads")


def check_logprobs(kind: str, threads: int = 64, vocabulary: int = VOCABULARY, tokens: int = 1) -> None:
    """The record of `logprobs.token_logprobs`; its tokens and rank exactly, sums to float32's rounding."""
    rng = generator(6, LOGPROBS.index(kind))
    ring, posted = 4, np.array([7], np.int64)
    kernel = logprobs.make_logprobs(vocabulary, ring=ring, threads=threads)
    shared_bytes = logprobs.logprobs_shared_bytes(vocabulary, threads)
    logits = np.resize(make_logits(kind, rng), vocabulary)
    if kind == "few threads":  # have the most likely tokens: the list is as long as it can be
        logits[np.arange(vocabulary) % threads < logprobs.MOST] += 100
    for chosen in rng.choice(np.flatnonzero(np.isfinite(logits)), tokens).tolist():
        records = np.full(ring * logprobs.RECORD_WORDS, 77, np.int64)
        token = np.array([chosen], np.int32)
        arguments = logprobs.LogprobsArguments(logits=logits, token=token, tokens_posted=posted, records=records)
        launch(kernel, 1, threads, shared_bytes, arguments)
        written = records.reshape(ring, -1)
        assert (written[:3] == 77).all(), "another record of the ring"
        record = logprobs.read_record(written[3])
        expected = token_logprobs(logits, chosen, logprobs.MOST)
        assert record.log_sum_exp == pytest.approx(log_sum_exp(logits), abs=1e-6)
        assert (record.token, record.logit, record.rank) == (chosen, logits[chosen], expected.rank)
        assert [token for token, _ in record.top] == [entry.token for entry in expected.top]
        assert [logit for _, logit in record.top] == [logits[token] for token, _ in record.top]


_large_sample = cache(sample.make_sample)


def check_same_logits(kind: str, params: SamplingParams, draws: int, vocabulary: int = 128_256) -> None:
    """From the same logits the kernel as it is shipped, its reference and the CPU's sampler draw the same tokens."""
    rng = np.random.default_rng(5)
    case = TokenCase(kind, params.temperature, params.top_k, params.top_p, params.min_p)
    kernel, shared = _large_sample(vocabulary), sample.LAYOUT.shared_bytes
    nothing = np.zeros(vocabulary, np.bool_)
    logits = logits_of(kind, vocabulary, rng)
    likely = int(np.argmax(logits))  # its logit is not negative
    key = (0x80000000 + int(logits[likely].view(np.uint32))) << ID_BITS | (ID_MASK - likely)
    best, sums = np.array([key], np.int64), np.zeros(sample.LAYOUT.sums_words, np.int64)
    for draw in range(draws):
        state, token = np.array([7, draw], np.uint64), np.array([-1], np.int32)
        arguments = sample.SampleArguments(logits, bitmap(nothing), case.options, state, best.copy(), sums, token)
        launch(kernel, sample.sample_kernel(vocabulary, False).ctas, sample.THREADS, shared, arguments)
        assert not sums.any()
        assert token[0] == device_token(logits, params, 7, draw) == expected_token(logits, params, 7, draw), draw


def check_advance() -> None:
    """Position, bitmap and ring; twice, over the end of the ring."""
    ring_size = 4
    position, count = np.array([10], np.int64), np.array([3], np.int64)
    seen, ring = np.zeros(3, np.uint32), np.full(ring_size, 7, np.uint64)
    state = {"position": position, "seen": seen, "token_ring": ring, "tokens_posted": count}
    kernel = advance.make_advance(ring_size, sampled=True)
    for new, logit in ((31, 80.0), (64, np.nan)):
        best = run_argmax(np.array([0.5, logit], np.float32), np.zeros(2, np.bool_), TokenCase())
        arguments = advance.AdvanceArguments(**state, token=np.array([new], np.int32), best=best, tokens=1)
        launch(kernel, 1, 1, 0, arguments)
        assert best[0] == LOWEST_KEY, "the next arg-max would start from this one's result"
    assert position.tolist() == [12]
    assert seen.tolist() == [1 << 31, 0, 1]
    assert ring.tolist() == [5 << 32 | 1 << 31 | 64, 7, 7, 4 << 32 | 31]
    assert count.tolist() == [5]
    prompt = advance.make_advance(ring_size, sampled=False)
    initial: list[Any] = [array.copy() for array in (seen, ring, count)]
    best = np.array([LOWEST_KEY], np.int64)
    arguments = advance.AdvanceArguments(**state, token=np.array([1], np.int32), best=best, tokens=8)
    launch(prompt, 1, 1, 0, arguments)
    assert position.tolist() == [20]
    for array, old in zip((seen, ring, count), initial, strict=True):
        np.testing.assert_array_equal(array, old)
