"""Every GPU kernel in numba's CUDA simulator against its NumPy reference (checks: tests/support/kernel_cases.py)."""

import pytest
from family_kernel_cases import check_add_norm, check_cap_logits, check_tiles
from kernel_cases import (
    ATTENTIONS,
    FP16_LAYOUTS,
    LAYOUTS,
    PROJECTIONS,
    ROPES,
    AttentionCase,
    PrepackedLayout,
    ProjectionCase,
    RopeCase,
    check_attention,
    check_prepack,
    check_prepack_fp16,
    check_projection,
    check_rope,
)
from token_kernel_cases import (
    ARGMAXES,
    EMBEDDINGS,
    LOGPROBS,
    SAMPLES,
    TokenCase,
    check_advance,
    check_argmax,
    check_embedding,
    check_logprobs,
    check_same_logits,
    check_sample,
)

from numba_atomflow.sampling import SamplingParams


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_prepack(layout: PrepackedLayout) -> None:
    check_prepack(layout)


@pytest.mark.parametrize("layout", FP16_LAYOUTS, ids=str)
def test_prepack_fp16(layout: PrepackedLayout) -> None:
    check_prepack_fp16(layout)


@pytest.mark.parametrize("case", PROJECTIONS, ids=str)
def test_projection(case: ProjectionCase) -> None:
    check_projection(case)


@pytest.mark.parametrize("case", ROPES, ids=str)
def test_rope(case: RopeCase) -> None:
    check_rope(case)


@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_attention(case: AttentionCase) -> None:
    check_attention(case)


@pytest.mark.parametrize(("layout", "tokens"), EMBEDDINGS, ids=str)
def test_embedding(layout: PrepackedLayout, tokens: int) -> None:
    check_embedding(layout, tokens)


@pytest.mark.parametrize("case", ARGMAXES, ids=str)
def test_argmax(case: TokenCase) -> None:
    check_argmax(case)


TOP_K, TOP_P = SamplingParams(0.7, top_k=50), SamplingParams(1.0, top_p=0.95)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_sample(case: TokenCase) -> None:
    check_sample(case)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("kind", "vocabulary", "params"),
    [
        ("flat", 20_011, TOP_P),
        ("peaked", 20_011, TOP_K),
        ("tail", 20_011, TOP_P),
        ("tail", 90_001, TOP_K),
        ("equal", 20_011, TOP_P),
        ("equal", 20_011, TOP_K),
    ],
)
def test_sample_with_the_layout_of_the_product(kind: str, vocabulary: int, params: SamplingParams) -> None:
    """Bins of some tokens, of more than are ranked, and of more than are listed: different logits, or equal ones."""
    check_same_logits(kind, params, draws=1, vocabulary=vocabulary)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", LOGPROBS)
def test_logprobs(kind: str) -> None:
    check_logprobs(kind)


def test_logprobs_of_few_tokens() -> None:
    check_logprobs("normal", vocabulary=7)


def test_advance() -> None:
    check_advance()


def test_add_norm() -> None:
    check_add_norm(300, 2)


def test_tiles() -> None:
    check_tiles(152, 3)


def test_cap_logits() -> None:
    check_cap_logits(300, 30.0)
