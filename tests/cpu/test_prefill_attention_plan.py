"""The tiling of prefill attention: it fits every chip, and what cannot be tiled is refused."""

import pytest
from prefill_sweep_sizes import HEAD_DIMS

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.attention.prefill_plan import PrefillAttentionPlan, choose_prefill_attention_plan
from numba_atomflow.ops.cuda.attention.prefill_split import make_find_work
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.runtime.chip import Chip

# Shared memory of a CTA, and of an SM with what the driver takes of each CTA.
CHIPS = {(8, 0): (166912, 167936), (8, 9): (101376, 102400), (9, 0): (232448, 233472), (12, 0): (101376, 102400)}
OUT = ActivationTiles(6 * 64, 64)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("capability", CHIPS, ids=str)
def test_a_chosen_plan_fits_the_chip(capability: tuple[int, int], head_dim: int) -> None:
    per_cta, per_sm = CHIPS[capability]
    chip = Chip(132, per_cta, capability)
    plan = choose_prefill_attention_plan(8, 2, head_dim, ActivationTiles(8 * head_dim, 2048), chip)
    assert plan.shared_bytes <= per_cta
    assert (plan.instructions == "wgmma") == (capability == (9, 0))
    if plan.instructions == "mma":
        assert 2 * (plan.shared_bytes + 1024) <= per_sm, "two CTAs per SM hide each other's latency"
        assert plan.threads == 128


def test_few_tokens_have_one_consumer_warpgroup() -> None:
    chip, out = Chip(132, 232448, (9, 0)), ActivationTiles(8 * 128, 2048)
    plan = choose_prefill_attention_plan(8, 2, 128, out, chip, few=True)
    assert (plan.instructions, plan.query_tile, plan.consumer_warps) == ("wgmma", 64, 4)
    assert plan.shared_bytes <= chip.shared_bytes
    fp8 = ActivationTiles(8 * 128, 2048, 8)
    assert choose_prefill_attention_plan(8, 2, 128, fp8, chip, few=True).query_tile == 128


def test_the_grid_covers_the_tokens_of_every_head() -> None:
    plan = PrefillAttentionPlan(6, 2, 64, OUT, "mma", query_tile=16, key_block=32)
    assert [plan.ctas(tokens) for tokens in (1, 16, 17, 40)] == [6, 6, 12, 18]


@pytest.mark.parametrize(
    "changes",
    [
        {"query_tile": 24},
        {"key_block": 8},
        {"heads": 7, "out": ActivationTiles(7 * 64, 64)},
        {"instructions": "wgmma", "query_tile": 96, "stages": 2},
        {"instructions": "wgmma", "query_tile": 64},
        {"stages": 2},
        {"query_tile": 128, "sms": 4},
        {"out": ActivationTiles(6 * 64, 64, bits=8)},
        {"out": ActivationTiles(640, 64)},
    ],
    ids=str,
)
def test_what_cannot_be_tiled_is_refused(changes: dict[str, object]) -> None:
    sizes: dict[str, object] = {"heads": 6, "kv_heads": 2, "head_dim": 64, "out": OUT, "instructions": "mma"}
    sizes |= {"query_tile": 16, "key_block": 32}
    with pytest.raises(ValueError, match="prefill attention"):
        PrefillAttentionPlan(**(sizes | changes))  # type: ignore[arg-type]


def test_a_grid_of_few_tiles_is_multiplied() -> None:
    plan = PrefillAttentionPlan(6, 2, 64, OUT, "mma", query_tile=16, key_block=32, sms=20)
    assert [plan.ctas(tokens) for tokens in (1, 17, 40, 100)] == [18, 12, 18, 42]
    assert max(plan.ctas(tokens) for tokens in (1, 17, 40)) * plan.cta_partials <= plan.partials


CHUNKS = [(0, 1), (0, 40), (150, 16), (300, 1), (17, 0), (90, 100)]  # position, count
PADDED = [(*chunk, padded) for chunk in CHUNKS for padded in (16, 48, 112) if chunk[1] <= padded]


@pytest.mark.parametrize(("position", "count", "padded"), PADDED)
def test_every_key_block_of_every_tile_has_one_cta(
    position: int, count: int, padded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the grid was made for: a chunk of up to `padded` tokens."""
    plan = PrefillAttentionPlan(6, 2, 64, OUT, "mma", query_tile=16, key_block=32, sms=40)
    monkeypatch.setattr(ptx, "device_function", lambda function: function)  # as Python functions
    find_work = make_find_work(plan)
    found, shared = [], set()
    for cta in range(plan.ctas(padded)):
        tile, head, split, counter, active, block, end = find_work(cta, plan.ctas(padded), position, count)
        if tile >= 0:
            found += [(tile, head, b) for b in range(end, block + 1)]
            assert split < active
            if active > 1:
                assert cta < plan.sms
                assert counter < plan.counters
                shared.add((tile, head, cta - split, counter))
    seen = [min(position + (tile + 1) * 16, position + count) for tile in range(-(-count // 16))]
    wanted = [(t, h, b) for t, keys in enumerate(seen) for h in range(6) for b in range(-(-keys // 32))]
    assert sorted(found) == wanted
    for part in range(2, 4):  # the first CTA of a tile, and its counter, are its own
        assert len({each[part] for each in shared}) == len({each[:2] for each in shared}) == len(shared)
