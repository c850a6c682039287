"""Every GPU kernel in numba's CUDA simulator against its NumPy reference (checks: tests/support/kernel_cases.py)."""

import pytest
from kernel_cases import (
    ATTENTIONS,
    HALF_LAYOUTS,
    LAYOUTS,
    PROJECTIONS,
    ROPES,
    AttentionCase,
    FragmentLayout,
    ProjectionCase,
    RopeCase,
    check_attention,
    check_projection,
    check_repack,
    check_repack_halves,
    check_rope,
)
from token_kernel_cases import (
    ARGMAXES,
    EMBEDDINGS,
    SAMPLES,
    TokenCase,
    check_advance,
    check_argmax,
    check_embedding,
    check_sample,
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_repack(layout: FragmentLayout) -> None:
    check_repack(layout)


@pytest.mark.parametrize("layout", HALF_LAYOUTS, ids=str)
def test_repack_halves(layout: FragmentLayout) -> None:
    check_repack_halves(layout)


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
def test_embedding(layout: FragmentLayout, tokens: int) -> None:
    check_embedding(layout, tokens)


@pytest.mark.parametrize("case", ARGMAXES, ids=str)
def test_argmax(case: TokenCase) -> None:
    check_argmax(case)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_sample(case: TokenCase) -> None:
    check_sample(case)


def test_advance() -> None:
    check_advance()
