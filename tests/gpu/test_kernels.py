"""The checks of tests/sim on a real GPU, and the same at the sizes of real models."""

import pytest
from kernel_cases import (
    ATTENTIONS,
    LAYOUTS,
    PROJECTIONS,
    AttentionCase,
    FragmentLayout,
    ProjectionCase,
    check_attention,
    check_projection,
    check_repack,
    qkv_case,
)
from numba import cuda
from numba.core import config
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

if config.ENABLE_CUDASIM or not cuda.is_available():
    pytest.skip("no CUDA GPU (or its driver, or its libraries: extra cu13)", allow_module_level=True)

# Arrays on the host are copied to the device and back at every launch, which numba advises against.
pytestmark = pytest.mark.filterwarnings("ignore:.*Host array", "ignore:.*Grid size")

HARDWARE_FP8 = cuda.get_current_device().compute_capability >= (8, 9)

LARGE_PROJECTIONS = (
    ProjectionCase("store", 49152, 576, 1, warps=8, split=1, blocks=264),  # SmolLM2
    ProjectionCase("store", 128256, 3072, 1, warps=8, split=1, blocks=264),  # Llama 3.2 3B from here on
    ProjectionCase("add", 3072, 8192, 2, warps=8, split=8, blocks=192),  # more columns need more than 48 KB
    ProjectionCase("add", 3072, 3072, 1, warps=8, split=8, depth=3, blocks=192),
    ProjectionCase("swiglu", 16384, 3072, 1, warps=8, split=4, blocks=264),
    qkv_case(3072, 3, 128, 24, 8, warps=8, split=8, blocks=264),
    qkv_case(576, 8, 64, 9, 3, warps=8, split=4, blocks=30),
)
LARGE_ATTENTIONS = tuple(
    AttentionCase(head_dim, heads, kv_heads, columns, length, splits=132 // kv_heads, warps=8)
    for head_dim, heads, kv_heads, columns in ((128, 24, 8, 1), (64, 9, 3, 8), (80, 32, 32, 2), (96, 32, 32, 1))
    for length in (8, 127, 128, 129, 4096, 16384)
)


def runs_here(hardware_fp8: bool) -> None:
    if hardware_fp8 and not HARDWARE_FP8:
        pytest.skip("this GPU has no FP8 conversion (sm_89 and later have)")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_repack(layout: FragmentLayout) -> None:
    check_repack(layout)


@pytest.mark.parametrize("case", PROJECTIONS + LARGE_PROJECTIONS, ids=str)
def test_projection(case: ProjectionCase) -> None:
    runs_here(case.hardware_fp8)
    check_projection(case)


@pytest.mark.parametrize("case", ATTENTIONS + LARGE_ATTENTIONS, ids=str)
def test_attention(case: AttentionCase) -> None:
    check_attention(case)


@pytest.mark.parametrize(("layout", "columns"), EMBEDDINGS, ids=str)
def test_embedding(layout: FragmentLayout, columns: int) -> None:
    runs_here(layout.hardware_fp8)
    check_embedding(layout, columns)


@pytest.mark.parametrize("case", ARGMAXES, ids=str)
def test_argmax(case: TokenCase) -> None:
    check_argmax(case)


@pytest.mark.parametrize("case", SAMPLES, ids=str)
@pytest.mark.parametrize(("threads", "bins", "capacity"), [(64, 64, 8), (1024, 2048, 512)])
def test_sample(case: TokenCase, threads: int, bins: int, capacity: int) -> None:
    check_sample(case, threads, bins, capacity)


def test_advance() -> None:
    check_advance()
