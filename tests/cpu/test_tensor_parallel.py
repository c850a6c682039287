"""A model divided among several GPUs, as data: rows, kernels' shapes, memory, and what is refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pretended_gpu import PretendedDriver
from tiny_models import tiny_geometry

pytest.importorskip("numba_cuda", reason="the CUDA backend is made of it; there is none for macOS")

from numba_atomflow.backends.base import Verification
from numba_atomflow.backends.choose import BackendChoice
from numba_atomflow.backends.cuda.tensor_parallel.kernels import RankKernels
from numba_atomflow.backends.cuda.tensor_parallel.plan import plan_for_gpus, prefill_path, rank_plan
from numba_atomflow.checkpoint.format import fusion
from numba_atomflow.cli.options import gpus_of
from numba_atomflow.errors import BackendError, OptionError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.presets import PRESETS, find_preset
from numba_atomflow.model.sharding import Sharding
from numba_atomflow.ops.cuda.persistent.schedule import DOWN, LM_HEAD, PersistentShape
from numba_atomflow.ops.cuda.runtime.chip import Chip

HOPPER = Chip(132, 232448, (9, 0))
TINY = tiny_geometry(kv_heads=4, heads=8, hidden=256)
QWEN = replace(TINY, qkv_bias=True, qk_norm=True)
DIVISIBLE = [TINY, QWEN, *(PRESETS[name] for name in PRESETS if name.startswith("llama"))]


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("geometry", DIVISIBLE, ids=lambda g: f"hidden {g.hidden}")
def test_every_row_has_one_rank(geometry: ModelGeometry, ranks: int) -> None:
    sharding, shapes = Sharding(geometry, ranks), geometry.parameters()
    for part, tensors in fusion(replace(geometry, layers=1)).items():
        rows = sum(shapes[name][0] for name in tensors)
        if part.endswith("_norm"):
            assert sharding.rows(part, ranks - 1) == (slice(None),), "every rank has all of it"
            continue
        owned = [row for rank in range(ranks) for span in sharding.rows(part, rank) for row in range(rows)[span]]
        assert sorted(owned) == list(range(rows)), part


def test_a_rank_has_the_query_heads_of_its_keys_and_the_two_rows_of_its_units() -> None:
    sharding = Sharding(TINY, 2)
    assert sharding.rows("layer.0.qkv", 1) == (slice(256, 512), slice(640, 768), slice(896, 1024))
    assert sharding.rows("layer.0.gate_up", 1) == (slice(160, 320), slice(480, 640))
    own = sharding.rank_geometry
    assert (own.heads, own.kv_heads, own.ffn, own.hidden) == (4, 2, 160, 256)


def test_the_vocabulary_is_divided_by_whole_tiles() -> None:
    sharding = Sharding(replace(TINY, vocabulary=1000), 4)  # 62.5 tiles
    rows = [sharding.rows("embedding", rank)[0] for rank in range(4)]
    assert rows == [slice(0, 256), slice(256, 512), slice(512, 768), slice(768, 1000)]
    assert sharding.vocabulary_rows == 256


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"heads": 3, "kv_heads": 3}, 2, "it has 3 key/value heads; use --gpus 1."),
        ({"heads": 8, "kv_heads": 8, "hidden": 128}, 8, "use --gpus 1 or --gpus 2 or --gpus 4 or --gpus 8."),
        ({"hidden": 144}, 2, "its hidden size, 144, is no multiple of 32; use --gpus 1."),
        ({"ffn": 328}, 2, "its MLP's size, 328, is no multiple of 16; use --gpus 1."),
        ({"vocabulary": 16}, 2, "its vocabulary has 16 tokens; use --gpus 1."),
        ({}, 9, "--gpus is 9; a model can be divided among 2 to 8 GPUs."),
        ({}, 1, "--gpus is 1; a model can be divided among 2 to 8 GPUs."),
    ],
)
def test_what_cannot_be_divided_is_refused(changes: dict[str, Any], ranks: int, message: str) -> None:
    geometry = tiny_geometry(**changes)
    if ranks == 8:  # divides; of 3, message lists what would
        geometry, ranks = replace(geometry, hidden=1024, ffn=1024, vocabulary=2048), 3
    with pytest.raises(OptionError) as error:
        Sharding(geometry, ranks)
    assert str(error.value).endswith(message)


# --- kernels and memory ----------------------------------------------------------------------------------------------


def shape_of(geometry: ModelGeometry, ranks: int, **options: Any) -> PersistentShape:
    return RankKernels(Sharding(geometry, ranks), HOPPER, **options).persistent_shape


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"])
def test_a_rank_reads_what_one_gpu_reads_and_writes_its_part(name: str, ranks: int) -> None:
    geometry = find_preset(name)
    shape = shape_of(geometry, ranks)
    assert shape.o.in_features == geometry.q_dim
    assert shape.down.in_features == geometry.ffn
    assert shape.o.out_features * ranks == shape.down.out_features * ranks == shape.hidden == geometry.hidden
    assert shape.plans[LM_HEAD].work_tiles * ranks * 16 == geometry.vocabulary
    assert shape.kv_splits == HOPPER.sms // geometry.kv_heads, "as on one GPU: the sums of attention have its order"
    assert shape.kv_splits * shape.kv_heads <= shape.sms
    places = shape.mailbox
    assert places.intermediate - places.attn_out == geometry.q_dim // 2
    assert places.k - places.q == geometry.q_dim // 2 // ranks
    assert places.end - places.best_keys >= 2 * ranks


def test_ranks_that_share_a_gpu_have_its_splits() -> None:
    shared = shape_of(find_preset("llama-3.2-3b"), 2, ranks_per_gpu=2)
    assert (shared.sms, shared.kv_splits, shared.kv_heads) == (66, 16, 4)


def test_a_rank_has_the_bias_of_its_heads() -> None:
    kernels = RankKernels(Sharding(QWEN, 2), HOPPER)
    assert kernels.persistent_shape.rope_in_attention
    assert kernels.layouts["qkv"].half == 0
    buffers = {buffer.name: buffer for buffer in rank_plan(kernels, 96).buffers}
    assert buffers["layer.1.qkv_bias"].shape == (256 + 2 * 128,)
    assert buffers["layer.1.q_norm"].shape == (64,)
    assert buffers["persistent.table"].shape == (kernels.persistent_shape.table_entries,)


def test_the_memory_of_a_rank() -> None:
    kernels = RankKernels(Sharding(TINY, 2), HOPPER)
    buffers = {buffer.name: buffer for buffer in rank_plan(kernels, 96).buffers}
    assert buffers["kv_cache"].shape == (2, 2, 96 + 7, 128), "padding of a step of 8 tokens may lie behind the last"
    assert buffers["q"].shape == (1, 256)
    assert buffers["logits"].shape == (1, 288)
    assert buffers["residual"].shape == (1, 256)
    assert buffers["layer.0.o"].shape == (kernels.layouts["o"].words,)
    whole = RankKernels(Sharding(TINY, 4), HOPPER)
    half, quarter = (rank_plan(k, 4096).pool_bytes() for k in (kernels, whole))
    assert half["kv cache"] == 2 * quarter["kv cache"]
    assert np.isclose(half["weights"], 2 * quarter["weights"], rtol=0.1)


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("llama-3.2-3b", [2.16, 1.09, 0.56]), ("llama-3.1-8b", [4.73, 2.39, 1.22]), ("llama-3.3-70b", [37.8, 18.9, 9.5])],
)
def test_the_documented_memory_and_an_even_schedule(name: str, gigabytes: list[float]) -> None:
    """docs/many-gpus.md; and no CTA has more than 2 % above its share of the weights."""
    for ranks, planned in zip((2, 4, 8), gigabytes, strict=True):
        kernels = RankKernels(Sharding(find_preset(name), ranks), HOPPER)
        assert rank_plan(kernels, 8192).total / 1e9 == pytest.approx(planned, rel=0.006)
        filled = kernels.persistent_shape.stages_filled(kernels.persistent_shape.rotation)
        assert filled.max() < 1.02 * filled.mean()


@pytest.mark.parametrize(
    ("name", "ranks", "widths", "halves"),
    [
        ("llama-3.2-3b", 2, [2, 4, 8], [8]),
        ("llama-3.1-8b", 8, [2, 4, 8], [8]),
        ("llama-3.3-70b", 4, [2, 4], [4]),  # of 4, half of the inputs of down fit
    ],
)
def test_how_many_tokens_a_step_takes(name: str, ranks: int, widths: list[int], halves: list[int]) -> None:
    kernels = RankKernels(Sharding(find_preset(name), ranks), HOPPER)
    assert list(kernels.wide_shapes) == widths
    assert [columns for columns, shape in kernels.wide_shapes.items() if shape.plans[DOWN].k_halves] == halves
    assert kernels.verification == Verification(widths[-1], automatic=False)
    buffers = {buffer.name: buffer for buffer in rank_plan(kernels, 96).buffers}
    for columns, shape in kernels.wide_shapes.items():
        assert buffers[f"verify.mailbox_x{columns}"].shape == (shape.mailbox.end,)
        vectors = columns * (shape.o.in_features + shape.down.in_features) // 2
        assert buffers[f"verify.vectors_x{columns}"].shape == (2, shape.layers, vectors), "of all ranks"
        keys = next(place for place in shape.mailbox if place > shape.mailbox.best_keys) - shape.mailbox.best_keys
        assert keys >= 2 * ranks * columns


def test_without_room_for_two_inputs_prompts_take_a_token_at_a_time() -> None:
    kernels = RankKernels(Sharding(replace(TINY, ffn=16384), 2), Chip(131, 118 << 10, (9, 0)))
    assert kernels.wide_shapes == {}
    assert kernels.verification.reason == "shared memory has no room for the inputs of two tokens"
    assert prefill_path(kernels).reason.endswith("in decode steps, one token at a time")
    assert {b.name: b for b in rank_plan(kernels, 96).buffers}["kv_cache"].shape[2] == 96


def test_models_and_gpus_without_the_kernel_are_refused() -> None:
    for geometry, chip, reason in (
        (replace(TINY, post_norm=True), HOPPER, "because the model has norms after attention and after the MLP; use"),
        (TINY, Chip(128, 101376, (8, 9)), "because this GPU's compute capability is 8.9"),
        (TINY, Chip(132, 99 << 8, (9, 0)), "leave no room for a pipeline of weights; use --gpus 1."),
    ):
        with pytest.raises(BackendError) as error:
            RankKernels(Sharding(geometry, 2), chip)
        assert reason in str(error.value)


def test_a_plan_needs_one_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    PretendedDriver().install(monkeypatch)
    plan, record = plan_for_gpus(TINY, "fp8", 96, 4)
    assert plan.pool_bytes()["kv cache"] == 2 * 2 * (96 + 7) * 64 * 2
    assert record["decode"]["name"] == "persistent"
    assert record["prefill"]["reason"] == "several GPUs run prompts in decode steps, up to 8 tokens at a time"
    with pytest.raises(OptionError, match="3 GPUs cannot share this model evenly"):
        plan_for_gpus(TINY, "fp8", 96, 3)


# --- the option ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "gpus"), [("1", 1), ("12", 12), ("all", "all")])
def test_values_of_the_option(text: str, gpus: Any) -> None:
    assert gpus_of(text) == gpus


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "", "9" * 12, "\u0662"])
def test_other_values_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="it must be a whole number from 1 on, or all"):
        gpus_of(text)


def test_which_gpus_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = PretendedDriver()
    pretended.install(monkeypatch)
    pretended.gpus = 4
    assert BackendChoice().gpu_ordinals == (0,)
    assert BackendChoice(device_ordinal=2).gpu_ordinals == (2,)
    assert BackendChoice(gpus=2, device_ordinal=1).gpu_ordinals == (1, 2)
    assert BackendChoice(gpus="all", device_ordinal=1).gpu_ordinals == (1, 2, 3)
    assert BackendChoice(gpus=[3, 1]).gpu_ordinals == (3, 1)
    assert BackendChoice(gpus=2).needs_gpu
    assert not BackendChoice(gpus=1).needs_gpu


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 0}, "gpus is 0; it must be"),
        ({"gpus": True}, "gpus is True; it must be"),
        ({"gpus": "two"}, "gpus is"),
        ({"gpus": []}, "gpus is"),
        ({"gpus": [0, 1], "device_ordinal": 1}, "gpus is"),
        ({"gpus": 2, "name": "cpu"}, "--gpus 2 is for the CUDA backend; leave it out, or use --backend cuda."),
        ({"gpus": 2, "threads": 2}, "--threads is for the CPU backend and --gpus 2 for the CUDA one"),
        ({"gpus": 2, "decode": "graph"}, "--decode graph is for one GPU; leave it out, or use --gpus 1."),
        ({"gpus": 2, "prefill": "gemm"}, "--prefill gemm is for one GPU"),
        ({"gpus": 2, "prefill_chunk": 64}, "--prefill-chunk is for one GPU"),
    ],
)
def test_choices_that_contradict_themselves(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as error:
        BackendChoice(**options)
    assert message in str(error.value)
