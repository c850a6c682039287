"""Kernels that make FP8 activations, on a GPU, at the sizes of models."""

import pytest
from device_launch import chip
from fp8_activation_cases import NORMED, QUANTIZED, check_quantize_tiles, check_rms_norm_fp8
from prefill_attention_cases import PrefillAttentionCase, check_prefill_attention


@pytest.fixture(autouse=True)
def _converts_to_fp8() -> None:
    if chip().capability < (8, 9):
        pytest.skip("conversion to FP8 needs sm_89")


@pytest.mark.parametrize("sizes", [*QUANTIZED, (3072, 2048, 2048), (8192, 512, 136), (14336, 64, 16)], ids=str)
def test_quantize_tiles(sizes: tuple[int, int, int]) -> None:
    check_quantize_tiles(*sizes)


@pytest.mark.parametrize("sizes", [*NORMED, (3072, 256, 200), (4096, 64, 64), (8192, 8, 8)], ids=str)
def test_rms_norm_fp8(sizes: tuple[int, int, int]) -> None:
    check_rms_norm_fp8(*sizes)


@pytest.mark.parametrize(("position", "count"), [(0, 1), (0, 130), (77, 300), (1000, 64)])
def test_attention_to_fp8_tiles(position: int, count: int) -> None:
    if chip().capability != (9, 0):
        pytest.skip("only the wgmma form writes FP8")
    check_prefill_attention(PrefillAttentionCase(128, 6, 2, position, count, 128, 128, 2, instructions="wgmma", bits=8))
