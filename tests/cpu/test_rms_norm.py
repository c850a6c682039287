"""RMSNorm of a hidden state and of heads, against float64."""

import numpy as np
import pytest
from closeness import check_close, poisoned, relative_l2, tolerance
from numpy.typing import NDArray

from numba_atomflow.ops.rms_norm import rms_norm, rms_norm_heads, rms_norm_reference

EPS = np.float32(1e-5)


def normed(x: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    y = poisoned(*x.shape)
    rms_norm(x, weight, EPS, y)
    return y


def exact(x: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """One row at a time, from the definition."""
    rows = [row / np.sqrt(sum(v * v for v in row) / len(row) + float(EPS)) for row in x.astype(np.float64)]
    return np.array(rows) * weight


@pytest.mark.parametrize("tokens", [1, 2, 5, 65, 513])
@pytest.mark.parametrize("hidden", [1, 7, 8, 9, 192, 200, 576])
def test_rows_are_normed(rng: np.random.Generator, hidden: int, tokens: int) -> None:
    x = (rng.standard_normal((tokens, hidden)) * np.exp(rng.uniform(-3, 5, (tokens, 1)))).astype(np.float32)
    weight = rng.standard_normal(hidden).astype(np.float32)
    expected = exact(x, weight)
    # The sum of squares rounds twice per element, but the square root halves that; four operations follow.
    check_close(normed(x, weight), expected, tolerance(hidden + 4))
    np.testing.assert_allclose(
        rms_norm_reference(x.astype(np.float64), weight.astype(np.float64), float(EPS)), expected, rtol=1e-12
    )


def test_the_reference_agrees_with_torch(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    x, weight = rng.standard_normal((3, 17)), rng.standard_normal(17)
    theirs = torch.nn.functional.rms_norm(torch.from_numpy(x), (17,), torch.from_numpy(weight), 1e-5)
    np.testing.assert_allclose(rms_norm_reference(x, weight, 1e-5), theirs.numpy(), rtol=1e-12)


def test_eps_decides_for_tiny_rows_and_zeros_stay_zeros() -> None:
    x = np.stack([np.full(64, 1e-6, np.float32), np.zeros(64, np.float32)])
    y = normed(x, np.ones(64, np.float32))
    np.testing.assert_allclose(y[0], 1e-6 / np.sqrt(1e-12 + float(EPS)), rtol=tolerance(68))
    assert not y[1].any()


def test_nan_stays_in_its_row(rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 100)).astype(np.float32)
    x[1, 99] = np.nan
    y = normed(x, np.ones(100, np.float32))
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


def test_a_missing_element_is_far_outside_the_tolerance(rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, 576)).astype(np.float32)
    x[:, 575] = 1  # of the size of the others: a random one may be next to nothing
    weight = np.ones(576, np.float32)
    expected = exact(x, weight)
    x[:, 575] = 0
    assert relative_l2(normed(x, weight)[:, :575], expected[:, :575]) > 20 * tolerance(580)


@pytest.mark.parametrize("tokens", [1, 2, 7, 65])
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(64, 9, 3), (80, 4, 1), (96, 3, 3), (128, 8, 1)])
def test_every_head_of_q_and_k_is_normed_for_itself(
    rng: np.random.Generator, head_dim: int, heads: int, kv_heads: int, tokens: int
) -> None:
    sizes = np.exp(rng.uniform(-3, 5, (tokens, heads + 2 * kv_heads, 1)))  # a norm over all heads would be far off
    given = (rng.standard_normal((tokens, heads + 2 * kv_heads, head_dim)) * sizes).astype(np.float32)
    q_weight, k_weight = rng.standard_normal((2, head_dim)).astype(np.float32)
    qkv = given.reshape(tokens, -1).copy()
    rms_norm_heads(qkv, q_weight, k_weight, heads * head_dim, kv_heads * head_dim, EPS)
    got = qkv.reshape(given.shape)
    q, k = given[:, :heads].astype(np.float64), given[:, heads:-kv_heads].astype(np.float64)
    check_close(got[:, :heads], rms_norm_reference(q, q_weight, float(EPS)), tolerance(head_dim + 4))
    check_close(got[:, heads:-kv_heads], rms_norm_reference(k, k_weight, float(EPS)), tolerance(head_dim + 4))
    np.testing.assert_array_equal(got[:, -kv_heads:], given[:, -kv_heads:])
