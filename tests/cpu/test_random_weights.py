"""Models with random weights, and the engine's generation of token ids."""

import time

import numpy as np
import pytest
from tiny_models import tiny_geometry

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.checkpoint.format import tensor_layout
from numba_atomflow.checkpoint.random_weights import POOL_BYTES, RandomModel
from numba_atomflow.errors import OptionError, TextError
from numba_atomflow.model.presets import PRESETS, find_preset
from numba_atomflow.ops.fp8 import dequantize_groups

PROMPT = [5, 6, 7, 8]


@pytest.fixture(autouse=True, scope="module")
def _random_codes_drawn_once() -> None:
    """Not here: each model draws its own."""


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return RandomModel(tiny_geometry(), seed=3)


def test_the_arrays_are_those_of_a_checkpoint_of_this_geometry(model: RandomModel) -> None:
    layout = tensor_layout(model.geometry)
    assert model.names() == list(layout)
    arrays = {name: model.array(name) for name in model.names()}
    for name, (dtype, shape) in layout.items():
        assert arrays[name].shape == shape
        assert arrays[name].dtype == (np.uint8 if dtype == "F8_E4M3" else np.float32)
        assert not arrays[name].flags.writeable
    assert model.payload_bytes == sum(array.nbytes for array in arrays.values())


def test_codes_are_not_nan_and_scales_are_positive(model: RandomModel) -> None:
    for name in model.names():
        array = model.array(name)
        if array.dtype == np.uint8:
            assert not np.any((array & 0x7F) == 0x7F)
            assert len(np.unique(array)) > 100
        else:
            assert np.all(array > 0)


def test_the_same_seed_gives_the_same_arrays_in_any_order() -> None:
    one, other, stranger = (RandomModel(tiny_geometry(), seed) for seed in (1, 1, 2))
    names = one.names()
    expected = {name: other.array(name) for name in reversed(names)}
    for name in names:
        np.testing.assert_array_equal(one.array(name), expected[name])
        assert not np.array_equal(one.array(name), stranger.array(name))
    assert not np.array_equal(one.array("layer.0.o.weight"), one.array("layer.1.o.weight"))


def test_norms_are_near_one_and_biases_near_zero() -> None:
    model = RandomModel(tiny_geometry(qkv_bias=True, qk_norm=True))
    for name, mean in (
        ("layer.0.attention_norm", 1),
        ("layer.1.q_norm", 1),
        ("final_norm", 1),
        ("layer.1.qkv_bias", 0),
    ):
        assert np.mean(model.array(name)) == pytest.approx(mean, abs=0.1)
        assert 0.05 < np.std(model.array(name)) < 0.15


@pytest.mark.parametrize("part", ["layer.0.qkv", "layer.1.o", "layer.0.gate_up", "layer.1.down", "vocabulary"])
def test_a_projection_keeps_activations_near_unit_size(model: RandomModel, part: str, rng: np.random.Generator) -> None:
    weights = dequantize_groups(model.array(f"{part}.weight"), model.array(f"{part}.scale"))
    outputs = weights @ rng.standard_normal((weights.shape[1], 32), np.float32)
    assert np.std(outputs) == pytest.approx(1, abs=0.15)


def test_a_tensor_larger_than_the_pool_is_periodic() -> None:
    model = RandomModel(tiny_geometry(vocabulary=100_000))
    codes = model.array("embedding.weight").reshape(-1)
    assert codes.size > POOL_BYTES
    np.testing.assert_array_equal(codes[POOL_BYTES:], codes[: codes.size - POOL_BYTES])
    assert not np.array_equal(codes[:192], codes[192:384])


def test_codes_are_copied_from_the_pool_and_not_drawn_one_by_one(model: RandomModel) -> None:
    pool = model._pool.tobytes()
    assert len(pool) == POOL_BYTES
    for name in ("layer.0.o.weight", "layer.1.down.weight", "embedding.weight"):
        assert model.array(name).tobytes() in pool + pool


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(OptionError, match="seed is -1"):
        RandomModel(tiny_geometry(), seed=-1)


def test_presets_have_the_sizes_in_their_names() -> None:
    billions = {name: round(geometry.parameter_count() / 1e9, 2) for name, geometry in PRESETS.items()}
    assert billions == {"llama-3.2-1b": 1.24, "llama-3.2-3b": 3.21, "llama-3.1-8b": 8.03} | {
        "llama-3.3-70b": 70.55,
        "smollm2-135m": 0.13,
    }
    with pytest.raises(OptionError, match=r"no geometry 'gpt-2'; choose one of llama-3.2-1b, .*smollm2-135m\."):
        find_preset("gpt-2")


# --- generation of token ids -----------------------------------------------------------------------------------------


def random_engine(**options: int) -> Engine:
    return Engine.random(tiny_geometry(), threads=1, **options)


def test_a_random_model_generates_the_same_tokens_again_and_others_with_another_seed() -> None:
    replies = []
    for seed in (0, 0, 1):
        with random_engine(seed=seed) as engine:
            replies.append(engine.generate_tokens(PROMPT, SamplingParams(max_tokens=8)).finish().token_ids)
    assert replies[0] == replies[1] != replies[2]
    assert len(set(replies[0])) > 1


def test_greedy_tokens_are_the_arg_max_of_logits() -> None:
    with random_engine() as engine:
        reply = engine.generate_tokens(PROMPT, SamplingParams(max_tokens=4))
        tokens = list(reply)
        assert tokens == reply.token_ids
        assert reply.finish_reason == "max_tokens"
        assert engine.token_ids == PROMPT + tokens[:-1]
        engine.reset()
        logits = engine.feed(PROMPT + tokens[:-1], all_logits=True)
        assert list(np.argmax(logits[len(PROMPT) - 1 :], axis=1)) == tokens


def test_tokens_are_generated_to_the_end_of_the_context() -> None:
    with random_engine(max_seq_len=10) as engine:
        reply = engine.generate_tokens(PROMPT).finish()
        assert (reply.finish_reason, reply.stats.tokens) == ("context", 7)
        again = engine.generate_tokens(PROMPT, SamplingParams(max_tokens=1)).finish()
        assert again.stats.reused_tokens == len(PROMPT) - 1


def test_decode_time_goes_from_the_first_token_to_the_last() -> None:
    """Includes the caller's time: a device runs ahead meanwhile, so the wait alone would underestimate it."""
    with random_engine() as engine:
        reply = engine.generate_tokens(PROMPT, SamplingParams(max_tokens=3))
        for _ in reply:
            time.sleep(0.2)
        assert reply.stats.decode_seconds > 0.4


def test_the_wait_for_a_token_is_ttft_or_decode_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device runs asynchronously; only the request for the token waits for it."""
    with random_engine() as engine:
        sampled_tokens = engine.backend.sampled_tokens

        def slow() -> int:
            time.sleep(0.05)
            return sampled_tokens()

        monkeypatch.setattr(engine.backend, "sampled_tokens", slow)
        reply = engine.generate_tokens(PROMPT, SamplingParams(max_tokens=3, speculate="off")).finish()
        assert reply.stats.ttft > 0.05
        assert reply.stats.decode_seconds > 0.1


def test_text_is_refused_without_a_tokenizer() -> None:
    with random_engine() as engine:
        with pytest.raises(TextError, match="no tokenizer"):
            engine.generate("a")
        with pytest.raises(OptionError, match="Stop strings need text"):
            engine.generate_tokens(PROMPT, SamplingParams(stop="a"))


def test_a_new_generation_interrupts_the_previous_one() -> None:
    with random_engine() as engine:
        first = engine.generate_tokens(PROMPT)
        next(first)
        engine.generate_tokens(PROMPT)
        assert first.finish_reason == "interrupted"
        assert list(first) == []
