"""The kernels of prefill steps, at every number of tokens that may be special, against float64."""

import pytest
from device_launch import chip
from prefill_attention_sweeps import (
    ATTENTIONS,
    CHUNKS,
    LONG_ATTENTIONS,
    LONG_CHUNKS,
    AttentionSweep,
    check_attention_chunk,
)
from prefill_sweep_sizes import LONG
from prefill_sweeps import (
    FP8_GEMMS,
    FP16_GEMMS,
    GEMMS,
    LONG_GEMMS,
    MMA_GEMMS,
    NORMS,
    QKVS,
    GemmSweep,
    NormSweep,
    check_gemm,
    check_norm,
)


@pytest.mark.parametrize("sweep", GEMMS + QKVS + FP8_GEMMS + FP16_GEMMS + MMA_GEMMS, ids=str)
def test_gemm(sweep: GemmSweep) -> None:
    if not sweep.runs_on(chip()):
        pytest.skip("FP8 activations and tiles of 256 tokens need wgmma (sm_90)")
    for tokens in sweep.tokens:
        check_gemm(sweep, tokens, chip())


@pytest.mark.parametrize("tokens", LONG)
@pytest.mark.parametrize("sweep", LONG_GEMMS, ids=str)
def test_gemm_of_many_tokens(sweep: GemmSweep, tokens: int) -> None:
    check_gemm(sweep, tokens, chip())


@pytest.mark.parametrize("sweep", ATTENTIONS, ids=str)
def test_attention_of_chunks(sweep: AttentionSweep) -> None:
    for tokens, position in CHUNKS:
        check_attention_chunk(sweep, tokens, position, chip())


@pytest.mark.parametrize(("tokens", "position"), LONG_CHUNKS)
@pytest.mark.parametrize("sweep", LONG_ATTENTIONS, ids=str)
def test_attention_of_long_chunks(sweep: AttentionSweep, tokens: int, position: int) -> None:
    check_attention_chunk(sweep, tokens, position, chip())


@pytest.mark.parametrize("sweep", NORMS, ids=str)
def test_norm_of_chunks(sweep: NormSweep) -> None:
    for tokens in sweep.tokens:
        check_norm(sweep, tokens, chip())
