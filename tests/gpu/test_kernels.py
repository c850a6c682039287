"""The checks of tests/sim on a real GPU, and the same at the sizes of real models."""

import pytest
from device_launch import capability
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
    qkv_case,
)
from sample_reference import DISTRIBUTIONS
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

from numba_atomflow.ops.formats import WeightFormat
from numba_atomflow.sampling import SamplingParams

LARGE_PROJECTIONS = (
    ProjectionCase("store", 49152, 576, 1, warps=8, split_k=1, ctas=264),  # SmolLM2
    ProjectionCase("store", 128256, 3072, 1, warps=8, split_k=1, ctas=264),  # Llama 3.2 3B from here on
    ProjectionCase("add", 3072, 8192, 2, warps=8, split_k=8, ctas=192),  # more tokens need more than 48 KB
    ProjectionCase("add", 3072, 3072, 1, warps=8, split_k=8, groups_in_flight=3, ctas=192),
    ProjectionCase("swiglu", 16384, 3072, 1, warps=8, split_k=4, ctas=264),
    qkv_case(3072, 3, 128, 24, 8, warps=8, split_k=8, ctas=264),
    qkv_case(576, 8, 64, 9, 3, warps=8, split_k=4, ctas=30),
)
LENGTHS = (1, 2, 127, 128, 129, 4096, 16384)
HEAD_DIMS, GQA_RATIOS = (64, 80, 96, 128), (1, 3, 4, 8)


def runs_here(weights: WeightFormat) -> None:
    if weights.converter == "cvt" and capability() < (8, 9):
        pytest.skip("this GPU has no FP8 conversion (sm_89 and later have)")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_prepack(layout: PrepackedLayout) -> None:
    check_prepack(layout)


@pytest.mark.parametrize("layout", FP16_LAYOUTS, ids=str)
def test_prepack_fp16(layout: PrepackedLayout) -> None:
    check_prepack_fp16(layout)


@pytest.mark.parametrize("case", PROJECTIONS + LARGE_PROJECTIONS, ids=str)
def test_projection(case: ProjectionCase) -> None:
    runs_here(case.format)
    check_projection(case)


@pytest.mark.parametrize("case", ROPES, ids=str)
def test_rope(case: RopeCase) -> None:
    check_rope(case)


@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_attention(case: AttentionCase) -> None:
    check_attention(case)


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("ratio", GQA_RATIOS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attention_at_every_geometry_and_length(head_dim: int, ratio: int, tokens: int) -> None:
    for length in LENGTHS:
        if length >= tokens:
            check_attention(AttentionCase(head_dim, 2 * ratio, 2, tokens, length, splits=66, warps=8))


@pytest.mark.parametrize("ratio", GQA_RATIOS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_qkv_at_every_geometry(head_dim: int, ratio: int) -> None:
    check_projection(qkv_case(576, 3, head_dim, 2 * ratio, 2, warps=8, split_k=4, ctas=40))


@pytest.mark.parametrize(("layout", "tokens"), EMBEDDINGS, ids=str)
def test_embedding(layout: PrepackedLayout, tokens: int) -> None:
    runs_here(layout.format)
    check_embedding(layout, tokens)


@pytest.mark.parametrize("case", ARGMAXES, ids=str)
def test_argmax(case: TokenCase) -> None:
    check_argmax(case)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize(
    "params",
    [SamplingParams(1.0), SamplingParams(0.7, top_k=50), SamplingParams(1.0, top_p=0.95)],
    ids=["all", "top-k", "top-p"],
)
def test_from_the_same_logits_the_cpu_draws_the_same_tokens(kind: str, params: SamplingParams) -> None:
    check_same_logits(kind, params, draws=40)


@pytest.mark.parametrize("case", SAMPLES, ids=str)
@pytest.mark.parametrize(("threads", "bins", "capacity"), [(64, 64, 8), (512, 2048, 256)])
def test_sample(case: TokenCase, threads: int, bins: int, capacity: int) -> None:
    check_sample(case, threads, bins, capacity)


@pytest.mark.parametrize("kind", LOGPROBS)
@pytest.mark.parametrize(("threads", "vocabulary"), [(64, 300), (1024, 7), (1024, 128_256), (1024, 262_144)])
def test_logprobs(kind: str, threads: int, vocabulary: int) -> None:
    check_logprobs(kind, threads, vocabulary, tokens=5)


def test_advance() -> None:
    check_advance()
