"""Steps of several tokens on a GPU: each column has the bits of the decode step of one token, logits and KV cache."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from device_launch import capability
from kernel_cases import launch
from numba import cuda
from numpy.typing import NDArray
from tiny_models import tiny_geometry
from wide_cases import CASES, CASES_OF_MANY_CTAS, LARGE_CASES, WideCase, check_bits

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.backends.base import Prefill
from numba_atomflow.backends.cuda.backend import CudaBackend
from numba_atomflow.model.presets import PRESETS
from numba_atomflow.model.step import NO_LOGITS, SAMPLE, Attention, LmHead
from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.persistent.wide_vectors import ABSENT
from numba_atomflow.ops.cuda.runtime.spec import F32, U32
from numba_atomflow.sampling import Sampler, accepted_tokens

CONTEXTS = (1, 100, 222, 1790, 4000)  # 222 and 1790: columns on both sides of a change of the KV splits
COUNTS = (1, 2, 3, 4, 5, 8)
GEOMETRIES = {
    "SmolLM2": tiny_geometry(
        layers=2, hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocabulary=49152, max_positions=4096
    ),
    "3B": replace(PRESETS["llama-3.2-3b"], layers=2),
    "8B": replace(PRESETS["llama-3.1-8b"], layers=1),
    "Qwen3": replace(PRESETS["llama-3.2-3b"], layers=1, heads=32, qk_norm=True),
}

pytestmark = pytest.mark.filterwarnings("ignore::numba.core.errors.NumbaPerformanceWarning")


@pytest.fixture(autouse=True, scope="module")
def _bulk_copies() -> None:
    if capability() < (9, 0):
        pytest.skip("this GPU has no TMA bulk copies (sm_90 and later have)")


@pytest.fixture(params=GEOMETRIES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine.random(GEOMETRIES[request.param], "cuda", max_seq_len=4096, decode="persistent") as opened:
        yield opened


def cache_rows(backend: CudaBackend, start: int, stop: int) -> NDArray[np.uint16]:
    """Keys and values of all layers at positions start .. stop - 1."""
    ops = [op for op in backend.step(1, NO_LOGITS) if isinstance(op, Attention)]
    with backend.memory() as memory:
        rows = [memory.read(view)[start:stop] for op in ops for view in (op.keys, op.values)]
    return np.stack(rows).view(np.uint16)


def decode_steps(engine: Engine, position: int, tokens: list[int]) -> NDArray[np.float32]:
    """Logits of these tokens, taken one by one by the kernel of decode steps."""
    backend = engine.backend
    backend.start(Sampler(SamplingParams(), engine.geometry.vocabulary, ()))
    backend.seek(position)
    logits = []
    for offset, token in enumerate(tokens):
        backend.seek(position + offset)
        logits.append(_decode_step(backend, token))
    return np.stack(logits)


def _decode_step(backend: CudaBackend, token: int) -> NDArray[np.float32]:
    """One whole decode step, in the launch that generations use; its logits."""
    graphs, queue = backend._graphs, backend._queue
    with backend._owner.current():
        backend._send([token])
        queue.run(1, SAMPLE)
    backend.sampled_tokens()
    head = next(op for op in backend.step(1, SAMPLE) if isinstance(op, LmHead))
    assert graphs.samples_in_kernel
    with backend.memory() as memory:
        return memory.read(head.logits)[0]


@pytest.mark.parametrize("case", [*CASES, *CASES_OF_MANY_CTAS, *LARGE_CASES], ids=str)
def test_columns_have_the_bits_of_single_steps(case: WideCase) -> None:
    check_bits(case)


def test_steps_of_any_width_have_the_bits_of_decode_steps(engine: Engine) -> None:
    backend = engine.backend
    assert isinstance(backend, CudaBackend)
    width, tokens = backend.verification.width, np.random.default_rng(1).integers(0, 4096, 4096).tolist()
    assert width >= 4
    engine.feed(tokens[:4090])
    for context in CONTEXTS:
        proposed = tokens[context : context + width]
        expected = decode_steps(engine, context, proposed)
        expected_cache = cache_rows(backend, context, context + width)
        assert np.isfinite(expected).all()
        for count in COUNTS:
            if count > width:
                continue
            backend.seek(context)
            got = backend.verify(proposed[:count]).copy()
            differing = np.flatnonzero((got.view(np.uint32) != expected[:count].view(np.uint32)).any(axis=1))
            assert differing.size == 0, f"context {context}, {count} tokens: logits of columns {differing}"
            cache = cache_rows(backend, context, context + count)
            assert np.array_equal(cache, expected_cache[:, :count]), f"context {context}, {count} tokens: KV cache"
            likely = expected.argmax(axis=1).tolist()
            assert backend.verify_greedy(proposed[:count]) == accepted_tokens(proposed[:count], likely.__getitem__)


NANS = np.array([0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001], np.uint32).view(np.float32)


class ConvertArguments(NamedTuple):
    """The parameter of `convert`."""

    values: F32
    out: U32


@ptx.kernel(32, 1)
def convert(io):
    """Pairs of float16 of the values, in both orders."""
    i, count = cuda.threadIdx.x, len(io.values)
    if i < count:
        io.out[i] = ptx.pack_f16x2(io.values[i], io.values[count - 1 - i])


def test_no_nan_is_the_mark_of_what_has_not_arrived() -> None:
    out = np.zeros(len(NANS), np.uint32)
    launch(convert, 1, 32, 0, ConvertArguments(NANS, out))
    assert out.tolist() == [0x7FFF7FFF] * len(NANS)
    assert ABSENT not in out


def test_a_step_takes_nothing_from_steps_before_one_that_failed() -> None:
    """The number of steps may then be wrong, and with it which half of the vectors is the next step's."""
    tokens = np.random.default_rng(6).integers(0, 4096, 64).tolist()
    with Engine.random(GEOMETRIES["SmolLM2"], "cuda", max_seq_len=512, decode="persistent") as engine:
        backend = engine.backend
        engine.feed(tokens)
        expected = decode_steps(engine, len(tokens), tokens[:4])
        for steps_before in (1, 2):
            for _ in range(steps_before):
                backend.seek(len(tokens))
                backend.verify(tokens[10:14])
            backend._queue.distrust()
            backend.seek(len(tokens))
            got = backend.verify(tokens[:4])
            assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))


def test_the_most_likely_tokens_are_accepted(engine: Engine) -> None:
    backend = engine.backend
    tokens = np.random.default_rng(4).integers(0, 4096, 32).tolist()
    engine.feed(tokens)
    backend.seek(len(tokens))
    likely = [7]
    for position in range(len(tokens), len(tokens) + backend.verification.width):
        backend.seek(position)
        likely += backend.verify_greedy(likely[-1:])
    proposed = likely[:-1]
    backend.seek(len(tokens))
    assert backend.verify_greedy(proposed) == likely[1:]
    proposed[-1] = (proposed[-1] + 1) % engine.geometry.vocabulary
    assert backend.verify_greedy(proposed) == likely[1:-1]


def test_a_step_at_the_end_of_the_context(engine: Engine) -> None:
    backend = engine.backend
    tokens = np.random.default_rng(2).integers(0, 4096, 4096).tolist()
    count = min(3, backend.verification.width)
    position = engine.max_seq_len - count
    engine.feed(tokens[:position])
    expected = decode_steps(engine, position, tokens[:count])
    backend.seek(position)
    got = backend.verify(tokens[:count])
    assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))
    with pytest.raises(IndexError):
        backend.verify(tokens[: count + 1])


@pytest.mark.parametrize("prefill", ["gemm", "gemv"])
def test_a_prompt_of_a_few_tokens_leaves_what_decode_steps_leave(prefill: Prefill) -> None:
    """After a prefix that is in the KV cache: keys, values, all logits, and the token that is chosen."""
    with Engine.random(GEOMETRIES["3B"], "cuda", max_seq_len=4096, decode="persistent", prefill=prefill) as engine:
        backend = engine.backend
        assert isinstance(backend, CudaBackend)
        assert backend.kernels.prompt_widths == (2, 4)
        tokens = np.random.default_rng(5).integers(0, 4096, 4096).tolist()
        engine.feed(tokens[:2100])
        for context in (2096, 222, 1):
            expected = decode_steps(engine, context, tokens[context : context + 4])
            expected_cache = cache_rows(backend, context, context + 4)
            for count in (2, 3, 4):
                prompt = tokens[: context + count]
                engine.rewind(context)
                rows = engine.feed(prompt[context:], all_logits=True)
                assert np.array_equal(rows.view(np.uint32), expected[:count].view(np.uint32)), (context, count)
                cache = cache_rows(backend, context, context + count)
                assert np.array_equal(cache, expected_cache[:, :count]), (context, count)
                for logprobs in (None, 0):
                    engine.rewind(context)
                    params = SamplingParams(max_tokens=1, ignore_eos=True, logprobs=logprobs)
                    reply = engine.generate_tokens(prompt, params).finish()
                    assert reply.stats.reused_tokens == context
                    assert reply.token_ids == [int(expected[count - 1].argmax())], (context, count)


class Continuation:
    """Proposes the true continuation, with some tokens replaced."""

    def __init__(self, tokens: list[int], start: int) -> None:
        self.tokens, self.start = tokens, start

    def propose(self, token_ids: list[int], limit: int) -> list[int]:
        at = len(token_ids) - self.start
        return [token ^ (place % 5 == 0) for place, token in enumerate(self.tokens[at : at + limit], at)]

    def observe(self, result: object) -> None:
        pass


@pytest.mark.parametrize(
    "options",
    [
        {"logprobs": 0},
        {"logprobs": 0, "temperature": 0.8},
        {},
        {"temperature": 0.8},
        {"temperature": 1.2, "top_k": 50, "min_p": 0.02},
        {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.3},
        {"repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_a_reply_is_the_same_with_and_without_a_drafter(options: dict[str, Any]) -> None:
    """With log-probabilities each token is chosen on the host, without them on the device."""
    geometry, temperature = replace(GEOMETRIES["SmolLM2"], vocabulary=4096), options.get("temperature", 0.0)
    params = SamplingParams(max_tokens=120, seed=3, **options)
    prompt = list(range(5, 60))
    with Engine.random(geometry, "cuda", max_seq_len=512, decode="persistent") as engine:
        plain = engine.generate_tokens(prompt, params).finish().token_ids
        drafter = Continuation(plain, len(prompt))
        engine.reset()
        reply = engine.generate_tokens(prompt, params, drafter=drafter).finish()
        assert reply.token_ids == plain
        assert reply.stats.accepted > 60
        if temperature == 0.0 and "repetition_penalty" not in options:
            engine.reset()
            device = engine.generate_tokens(prompt, SamplingParams(max_tokens=120)).finish().token_ids
            assert device == plain


def test_prompt_lookup_only_where_it_is_asked_for() -> None:
    geometry = GEOMETRIES["SmolLM2"]
    with Engine.random(geometry, "cuda", max_seq_len=512, decode="persistent") as engine:
        prompt = [7, 8, 9, 10] * 12
        plain = engine.generate_tokens(prompt, SamplingParams(max_tokens=60)).finish()
        assert plain.stats.proposed == 0
        engine.reset()
        lookup = engine.generate_tokens(prompt, SamplingParams(max_tokens=60, speculate="lookup")).finish()
        assert lookup.token_ids == plain.token_ids
