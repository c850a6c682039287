"""Prefill attention in numba's CUDA simulator (checks: tests/support/prefill_attention_cases.py)."""

import pytest
from prefill_attention_cases import PrefillAttentionCase, check_prefill_attention

MMA = (
    PrefillAttentionCase(64, 1, 1, position=0, count=1, query_tile=16, key_block=16),  # a token alone
    PrefillAttentionCase(64, 2, 1, position=0, count=21, query_tile=16, key_block=16),  # two tiles, one with 5 rows
    PrefillAttentionCase(80, 1, 1, position=9, count=14, query_tile=16, key_block=16),  # starts in a block's middle
    PrefillAttentionCase(96, 2, 2, position=3, count=10, query_tile=16, key_block=32),  # blocks masked for early rows
    PrefillAttentionCase(128, 2, 1, position=30, count=3, query_tile=16, key_block=16),
    PrefillAttentionCase(64, 2, 1, position=120, count=9, query_tile=16, key_block=16, sms=5),  # 129 keys, two splits
    PrefillAttentionCase(64, 1, 1, position=5, count=71, query_tile=128, key_block=32),  # two row blocks of a warp
    PrefillAttentionCase(64, 1, 1, position=40, count=20, query_tile=16, key_block=16, window=20),
    PrefillAttentionCase(64, 2, 1, position=150, count=9, query_tile=16, key_block=16, sms=5, window=120, soft_cap=9.0),
    PrefillAttentionCase(48, 1, 1, position=5, count=40, query_tile=128, key_block=32, window=3),
    PrefillAttentionCase(256, 1, 1, position=9, count=9, query_tile=16, key_block=16, soft_cap=30.0),
)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", MMA, ids=str)
def test_mma(case: PrefillAttentionCase) -> None:
    check_prefill_attention(case)


WGMMA = tuple(
    PrefillAttentionCase(*sizes[:8], "wgmma", *sizes[8:])
    for sizes in (
        # head_dim, heads, kv_heads, position, count, query_tile, key_block, stages, sms
        (64, 1, 1, 0, 1, 64, 16, 2),  # a token alone
        (64, 1, 1, 11, 66, 64, 32, 2),  # stages are used again; a tile of 2 rows
        (80, 1, 1, 3, 20, 64, 32, 2),
        (96, 2, 1, 20, 3, 64, 16, 2),
        (64, 1, 1, 140, 4, 64, 16, 2, 3),  # 9 blocks for three splits
        (128, 1, 1, 0, 70, 128, 32, 3),  # two warpgroups that take turns; blocks that the first does not see
    )
)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", WGMMA, ids=str)
def test_wgmma(case: PrefillAttentionCase) -> None:
    check_prefill_attention(case)


def test_fp8_output() -> None:
    check_prefill_attention(PrefillAttentionCase(128, 2, 1, 5, 21, 64, 32, 2, instructions="wgmma", bits=8))
