"""Attention against float64: one token and prefill chunks, every grouping, nothing read beyond the last position."""

from dataclasses import dataclass, replace

import numba
import numpy as np
import pytest
from closeness import check_close, poisoned, relative_l2, tolerance
from numpy.typing import NDArray

from numba_atomflow.ops import attention

HEADS = [(64, 9, 3), (64, 4, 1), (80, 3, 3), (80, 8, 1), (96, 8, 2), (96, 6, 2), (128, 4, 4), (128, 16, 2)]
TOKENS = [1, 2, 4, 5, 7, 65, 200, 513]


@dataclass
class Case:
    """T tokens after `position` earlier ones; the cache after the last token is NaN."""

    q: NDArray[np.float32]
    keys: NDArray[np.float32]
    values: NDArray[np.float32]
    position: int
    head_dim: int
    window: int = attention.NO_WINDOW
    soft_cap: np.float32 = attention.NO_CAP

    @property
    def length(self) -> int:
        return self.position + len(self.q)

    def expected(self) -> NDArray[np.float64]:
        """Head by head, softmax from its definition."""
        kv_heads = self.keys.shape[1] // self.head_dim
        q = self.q.astype(np.float64).reshape(len(self.q), -1, self.head_dim)
        ratio = q.shape[1] // kv_heads
        keys, values = (
            cache[: self.length].astype(np.float64).reshape(self.length, kv_heads, self.head_dim).repeat(ratio, axis=1)
            for cache in (self.keys, self.values)
        )
        scores = np.einsum("thd,shd->hts", q, keys) / np.sqrt(self.head_dim)
        if self.soft_cap:
            scores = self.soft_cap * np.tanh(scores / self.soft_cap)
        ages = self.position + np.arange(len(q))[:, None] - np.arange(self.length)
        visible = (ages >= 0) & (ages < self.window)
        scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        return np.einsum("hts,shd->thd", weights, values).reshape(len(q), -1)

    def tokens(self, first: int, count: int) -> NDArray[np.float32]:
        """What the kernel for a few tokens makes of rows first .. first + count - 1."""
        q, position = self.q[first : first + count], np.array([self.position + first], np.int64)
        out, scores = poisoned(*q.shape), poisoned(numba.config.NUMBA_NUM_THREADS, count, len(self.keys))
        attention.attend_tokens(
            q, self.keys, self.values, position, self.head_dim, self.window, self.soft_cap, scores, out
        )
        return out

    def token(self, t: int) -> NDArray[np.float32]:
        """Row t, by itself."""
        return self.tokens(t, 1)[0]

    def chunk(self) -> NDArray[np.float32]:
        """The result of the kernel for prefill chunks."""
        out, position = poisoned(*self.q.shape), np.array([self.position], np.int64)
        scratch = poisoned(numba.config.NUMBA_NUM_THREADS, attention.chunk_scratch(self.head_dim))
        attention.attend_chunk(
            self.q, self.keys, self.values, position, self.head_dim, self.window, self.soft_cap, scratch, out
        )
        return out


def case(rng: np.random.Generator, shape: tuple[int, int, int], tokens: int, position: int, size: float = 1.0) -> Case:
    head_dim, heads, kv_heads = shape
    length = position + tokens
    keys, values = poisoned(length + 33, kv_heads * head_dim), poisoned(length + 33, kv_heads * head_dim)
    keys[:length], values[:length] = rng.standard_normal((2, length, kv_heads * head_dim))
    q = (size * rng.standard_normal((tokens, heads * head_dim))).astype(np.float32)
    return Case(q, keys, values, position, head_dim)


def allowed(c: Case, size: float = 1.0) -> float:
    """Tolerance for queries of this size.

    A score is a sum of 2 * head_dim rounded terms of standard deviation `size`, and the maximum that is subtracted is
    below 6 `size`. The exponential turns that absolute error into a relative one, and adds 5e-7 (70 roundings as they
    are counted here). The weighted sum and its total make 3 roundings per position.
    """
    return tolerance(size**2 * (2 * c.head_dim + 6**2) + 70 + 3 * c.length)


def test_the_reference_agrees_with_torch_and_with_the_formula_used_here(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    c = case(rng, (64, 6, 2), 5, 0)
    q, k, v = (
        torch.from_numpy(a[:5].astype(np.float64).reshape(5, -1, 64)).transpose(0, 1) for a in (c.q, c.keys, c.values)
    )
    k, v = k.repeat_interleave(3, 0), v.repeat_interleave(3, 0)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(5, -1)
    np.testing.assert_allclose(c.expected(), theirs.numpy(), atol=1e-12)
    c = case(rng, (80, 4, 2), 3, 11)
    wide = (a.astype(np.float64) for a in (c.q, c.keys, c.values))
    np.testing.assert_allclose(attention.attend_reference(*wide, c.position, 80), c.expected(), atol=1e-12)


@pytest.mark.parametrize("position", [0, 1, 6, 255, 256, 600])
@pytest.mark.parametrize("shape", HEADS)
def test_one_token(rng: np.random.Generator, shape: tuple[int, int, int], position: int) -> None:
    c = case(rng, shape, 1, position)
    check_close(c.token(0)[None], c.expected(), allowed(c))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", HEADS)
def test_a_chunk(rng: np.random.Generator, shape: tuple[int, int, int], tokens: int) -> None:
    c = case(rng, shape, tokens, int(rng.integers(0, 300)))
    check_close(c.chunk(), c.expected(), allowed(c))


@pytest.mark.parametrize("position", [0, 1, 191, 255, 256, 257, 512])
def test_a_chunk_after_any_position(rng: np.random.Generator, position: int) -> None:
    c = case(rng, (64, 6, 2), 130, position)
    check_close(c.chunk(), c.expected(), allowed(c))


@pytest.mark.parametrize("size", [0.0, 5.0, 40.0])
def test_flat_and_peaked_attention(rng: np.random.Generator, size: float) -> None:
    c = case(rng, (64, 4, 2), 70, 400, size)
    check_close(c.chunk(), c.expected(), allowed(c, size))
    for t in (0, 69):
        check_close(c.token(t), c.expected()[t], allowed(c, size))


def test_scores_that_overflow_an_exponential(rng: np.random.Generator) -> None:
    """Scores of thousands: only the largest counts, and nothing becomes infinite."""
    c = case(rng, (64, 2, 1), 9, 300, 3000.0)
    winners = c.expected()
    for got in (c.chunk(), np.stack([c.token(t) for t in range(9)])):
        assert np.isfinite(got).all()
        # The error of scores is 3000 * tolerance(128) = 0.01: nearly equal scores may differ by that.
        check_close(got, winners, 3000 * tolerance(2 * 64 + 36))


@pytest.mark.parametrize("tokens", [1, 9, 130])
def test_what_lies_beyond_the_last_position_changes_nothing(rng: np.random.Generator, tokens: int) -> None:
    c = case(rng, (64, 6, 2), tokens, 100)
    run = c.chunk if tokens > 1 else lambda: c.token(0)
    beside_nan = run()
    c.keys[c.length :], c.values[c.length :] = 1.0, -1e6
    np.testing.assert_array_equal(run(), beside_nan)


def test_bits_do_not_depend_on_the_chunk(rng: np.random.Generator) -> None:
    c = case(rng, (80, 4, 2), 230, 70)
    whole = c.chunk()
    for first, stop in ((0, 1), (0, 31), (31, 230), (100, 163), (229, 230)):
        part = Case(c.q[first:stop], c.keys, c.values, c.position + first, c.head_dim)
        np.testing.assert_array_equal(part.chunk(), whole[first:stop])


@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("position", [0, 95, 700])
def test_a_few_tokens_have_the_bits_of_one(
    rng: np.random.Generator, shape: tuple[int, int, int], position: int
) -> None:
    c = case(rng, shape, 8, position)
    single = np.stack([c.token(t) for t in range(8)])
    for first, count in ((0, 8), (0, 2), (1, 3), (3, 5)):
        np.testing.assert_array_equal(c.tokens(first, count), single[first : first + count])


def test_a_chunk_is_causal(rng: np.random.Generator) -> None:
    c = case(rng, (64, 4, 2), 300, 20)
    before = c.chunk()
    c.keys[20 + 201 : c.length] += 1.0
    c.values[20 + 201 : c.length] = 0.0
    after = c.chunk()
    np.testing.assert_array_equal(after[:201], before[:201])
    assert min(relative_l2(after[t], before[t]) for t in range(201, 300)) > 1e-4


@pytest.mark.parametrize("where", ["q", "keys", "values"])
def test_nan_shows(rng: np.random.Generator, where: str) -> None:
    c = case(rng, (64, 2, 1), 5, 10)
    if where == "q":
        c.q[4, 3] = np.nan
    else:
        getattr(c, where)[12, 3] = np.nan
    column = slice(0, 64) if where != "values" else 3
    assert np.isnan(c.token(4)[column]).all()
    assert np.isnan(c.chunk()[4, column]).all()


@pytest.mark.parametrize("mistake", ["one position more", "one position fewer", "wrong key head", "no scale"])
def test_a_mistake_is_far_outside_the_tolerance(rng: np.random.Generator, mistake: str) -> None:
    c = case(rng, (64, 6, 2), 9, 200)
    expected = c.expected()
    if mistake == "one position more":
        c.keys[c.length], c.values[c.length] = rng.standard_normal((2, 128))
        c.position += 1
    elif mistake == "one position fewer":
        c.position -= 1
    elif mistake == "wrong key head":
        c.keys = np.ascontiguousarray(np.roll(c.keys, 64, axis=1))
    else:
        c.q *= 8
    for got, wanted in ((c.chunk(), expected), (c.token(8), expected[8])):
        assert relative_l2(got, wanted) > 20 * allowed(c)


WINDOWS = [1, 17, 96, 200, 4096]


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_sliding_window_and_a_soft_cap(rng: np.random.Generator, window: int, cap: float) -> None:
    """Keys before the window are read by no token; a chunk and single tokens agree."""
    c = replace(case(rng, (32, 4, 2), 150, 290, 3.0), window=window, soft_cap=np.float32(cap))
    dropped = max(0, c.position + 1 - window)
    c.values[:dropped] = 1e30
    wide = (a.astype(np.float64) for a in (c.q, c.keys, c.values))
    reference = attention.attend_reference(*wide, c.position, 32, window, cap)
    np.testing.assert_allclose(reference, c.expected(), atol=1e-12)
    check_close(c.chunk(), c.expected(), allowed(c, 3.0))
    for t in (0, 70, 149):
        check_close(c.token(t), c.expected()[t], allowed(c, 3.0))


@pytest.mark.parametrize("window", WINDOWS)
def test_windowed_tokens_have_the_same_bits_whatever_is_beside_them(rng: np.random.Generator, window: int) -> None:
    c = replace(case(rng, (64, 4, 2), 100, 130), window=window)
    np.testing.assert_array_equal(c.tokens(90, 6), np.stack([c.token(t) for t in range(90, 96)]))
    later = replace(c, q=c.q[5:], position=c.position + 5)
    np.testing.assert_array_equal(c.chunk()[5:], later.chunk())
