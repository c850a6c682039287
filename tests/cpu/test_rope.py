"""Rotary embedding and the write into the cache: only the rows of the new tokens change, by the right angles."""

import numpy as np
import pytest
from closeness import check_close, poisoned, relative_l2, tolerance
from tiny_models import tiny_geometry

from numba_atomflow.geometry import rope_inverse_frequencies
from numba_atomflow.ops.rope import rope_and_store, rope_reference, rope_table
from numba_atomflow.rope_scaling import Llama3Scaling, RopeScaling

POSITIONS = 600
LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)


def rotated(heads: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """heads [T, n, head_dim] as complex numbers (i, i + head_dim / 2), turned by position * frequency."""
    half = heads.shape[-1] // 2
    turned = (heads[..., :half] + 1j * heads[..., half:]) * np.exp(1j * positions[:, None] * frequencies)[:, None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_frequencies_agree_with_transformers(head_dim: int, scaling: RopeScaling | None) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    geometry = tiny_geometry(head_dim=head_dim, rope_theta=500000.0, rope_scaling=scaling)
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": 500000.0}
    if scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    config = transformers.LlamaConfig(
        hidden_size=192, num_attention_heads=2, head_dim=head_dim, rope_parameters=rope, max_position_embeddings=512
    )
    if scaling:
        theirs, factor = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        assert factor == 1.0
    else:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        theirs = LlamaRotaryEmbedding(config).inv_freq
    ours = rope_inverse_frequencies(geometry)
    # theirs is made of float32 operations: a power, a division, and a blend of four more
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=tolerance(8))
    plain = rope_inverse_frequencies(tiny_geometry(head_dim=head_dim, rope_theta=500000.0))
    assert (scaling is None) == np.array_equal(ours, plain)


def test_the_table_is_exact_to_float32_at_long_positions() -> None:
    frequencies = rope_inverse_frequencies(tiny_geometry(rope_theta=500000.0))
    cosines, sines = rope_table(frequencies, 131072)
    for position in (0, 1, 4095, 131071):
        # Turning by half the angle twice: another way to the same point of the circle.
        half = np.exp(0.5j * position * frequencies)
        np.testing.assert_allclose(cosines[position] + 1j * sines[position], half * half, rtol=0, atol=2.0**-23)


def test_the_reference_turns_pairs_like_complex_numbers(rng: np.random.Generator) -> None:
    heads, positions = rng.standard_normal((3, 2, 64)), np.array([0, 5, 500])
    frequencies = rope_inverse_frequencies(tiny_geometry())
    angles = positions[:, None] * frequencies
    np.testing.assert_allclose(
        rope_reference(heads, np.cos(angles), np.sin(angles)), rotated(heads, positions, frequencies), atol=1e-12
    )


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 7, 65, 200, 513])
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(64, 9, 3), (80, 4, 1), (96, 8, 8), (128, 8, 1)])
def test_q_is_turned_and_k_and_v_are_stored(
    rng: np.random.Generator, head_dim: int, heads: int, kv_heads: int, tokens: int
) -> None:
    geometry = tiny_geometry(head_dim=head_dim, heads=heads, kv_heads=kv_heads)
    frequencies = rope_inverse_frequencies(geometry)
    cosines, sines = rope_table(frequencies, POSITIONS)
    start = int(rng.integers(0, POSITIONS - tokens + 1))
    qkv = rng.standard_normal((tokens, geometry.q_dim + 2 * geometry.kv_dim)).astype(np.float32)
    q, keys, values = poisoned(tokens, geometry.q_dim), *(poisoned(POSITIONS, geometry.kv_dim) for _ in "kv")
    rope_and_store(qkv, np.array([start], np.int64), cosines, sines, q, keys, values)

    positions, stop = np.arange(start, start + tokens), start + tokens
    given_q, given_k, given_v = np.split(qkv, [geometry.q_dim, geometry.q_dim + geometry.kv_dim], axis=1)
    for got, given, count in ((q, given_q, heads), (keys[start:stop], given_k, kv_heads)):
        expected = rotated(given.astype(np.float64).reshape(tokens, count, head_dim), positions, frequencies)
        # a rounded sine, two products and a sum
        check_close(got, expected.reshape(tokens, -1), tolerance(4))
    np.testing.assert_array_equal(values[start:stop], given_v)
    for cache in (keys, values):  # nothing else was touched
        assert np.isnan(cache[:start]).all()
        assert np.isnan(cache[stop:]).all()


@pytest.mark.parametrize("mistake", ["position off by one", "neighbours paired"])
def test_a_mistake_is_far_outside_the_tolerance(rng: np.random.Generator, mistake: str) -> None:
    geometry = tiny_geometry(heads=2, kv_heads=2)
    frequencies = rope_inverse_frequencies(geometry)
    cosines, sines = rope_table(frequencies, POSITIONS)
    qkv = rng.standard_normal((3, 3 * geometry.q_dim)).astype(np.float32)
    given_q = qkv[:, : geometry.q_dim].astype(np.float64).reshape(3, 2, 64)
    expected = rotated(given_q, np.arange(100, 103), frequencies).reshape(3, -1)
    start = 100
    if mistake == "position off by one":
        start = 101
    else:
        order = np.arange(geometry.q_dim).reshape(2, 2, 32).transpose(0, 2, 1).ravel()
        qkv[:, : geometry.q_dim] = qkv[:, order]
    q, keys, values = poisoned(3, geometry.q_dim), *(poisoned(POSITIONS, geometry.kv_dim) for _ in "kv")
    rope_and_store(qkv, np.array([start], np.int64), cosines, sines, q, keys, values)
    assert relative_l2(q, expected) > 100 * tolerance(4)
