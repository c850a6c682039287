"""The loops of prompts on the CPU, one by one, and with the vectors of other processors."""

import os
import platform
import subprocess
import sys
from typing import Any

import ml_dtypes
import numba
import numpy as np
import pytest
from closeness import check_close, poisoned, tolerance
from numpy.typing import NDArray

from numba_atomflow.ops.simd_gemm import COLUMNS, LANES, ROW_STEP, ROWS, multiply_columns, multiply_rows
from numba_atomflow.ops.simd_panel import float16_columns, quantized_columns
from numba_atomflow.ops.simd_softmax import LOWEST, softmax_tile

X86 = platform.machine() in {"x86_64", "AMD64"}


@numba.njit
def rows_times_panel(*arguments: Any) -> None:
    multiply_rows(*arguments)


@numba.njit
def columns_times_panel(*arguments: Any) -> None:
    multiply_columns(*arguments)


@numba.njit
def dequantize(*arguments: Any) -> None:
    quantized_columns(*arguments)


@numba.njit
def widen(*arguments: Any) -> None:
    float16_columns(*arguments)


@numba.njit
def softmax(*arguments: Any) -> None:
    softmax_tile(*arguments)


def normal(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("depth", [1, 3, 4, 7, 130])
@pytest.mark.parametrize("rows", [*range(1, ROWS + 2), 3 * ROWS - 1])
def test_rows_times_a_panel(rng: np.random.Generator, rows: int, depth: int, add: bool) -> None:
    a, b = normal(rng, rows, depth + 5), normal(rng, depth + 1, COLUMNS + 3)
    written = -(-rows // ROW_STEP) * ROW_STEP
    c = poisoned(written + 1, COLUMNS + 2)
    before = normal(rng, written, COLUMNS)
    if add:
        c[:written, 1 : COLUMNS + 1] = before
    rows_times_panel(a, 5, depth + 5, rows, b, COLUMNS + 5, COLUMNS + 3, depth, c, 1, COLUMNS + 2, add)
    x, w = a.astype(np.float64), b.astype(np.float64)
    x, w = x.reshape(-1)[5:], w[1:, 2 : COLUMNS + 2]
    x = np.stack([x[r * (depth + 5) : r * (depth + 5) + depth] for r in range(rows)])
    expected = x @ w + (before[:rows] if add else 0)
    check_close(c[:rows, 1 : COLUMNS + 1], expected, tolerance(2 * depth + 1), np.abs(x) @ np.abs(w) + 1)
    beside = c.copy()
    beside[:written, 1 : COLUMNS + 1] = np.nan
    assert np.isnan(beside).all(), "something else was written"


@pytest.mark.parametrize("depth", [1, 5, 96])
@pytest.mark.parametrize("rows", [ROW_STEP, 2 * ROW_STEP, ROWS, COLUMNS])
def test_columns_times_a_panel(rng: np.random.Generator, rows: int, depth: int) -> None:
    a, b, c = normal(rng, depth, rows + 2), normal(rng, depth, COLUMNS), poisoned(rows, COLUMNS)
    columns_times_panel(a, 2, rows + 2, rows, b, 0, COLUMNS, depth, c, 0, COLUMNS, False)
    x, w = a[:, 2:].T.astype(np.float64), b.astype(np.float64)
    check_close(c, x @ w, tolerance(2 * depth), np.abs(x) @ np.abs(w))


def test_bits_do_not_depend_on_the_number_of_rows(rng: np.random.Generator) -> None:
    a, b = normal(rng, 2 * ROWS + 1, 133), normal(rng, 133, COLUMNS)

    def product(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        c = poisoned(-(-len(rows) // ROW_STEP) * ROW_STEP, COLUMNS)
        rows_times_panel(rows, 0, 133, len(rows), b, 0, COLUMNS, 133, c, 0, COLUMNS, False)
        return c[: len(rows)]

    whole = product(a)
    for first, count in ((0, 1), (3, ROW_STEP + 1), (5, ROWS), (ROWS, ROWS + 1)):
        np.testing.assert_array_equal(product(a[first : first + count]), whole[first : first + count])


@pytest.mark.parametrize(("rows", "width"), [(LANES, 256), (LANES + 3, 300), (1, 7), (40, 131)])
def test_every_code_in_a_panel(rng: np.random.Generator, rows: int, width: int) -> None:
    codes = rng.permutation(np.resize(np.arange(256), rows * width)).astype(np.uint8).reshape(rows, width)
    codes[codes & 0x7F == 0x7F] = 0  # NaN does not occur
    scales = np.exp(rng.uniform(-9, 3, (rows, -(-width // 128)))).astype(np.float32)
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scales[:, np.arange(width) // 128]
    for first in {0, max(0, rows - 5)}:
        for begin in range(0, width, 128):
            panel = poisoned(width - begin, COLUMNS)
            dequantize(codes.view(np.int8), scales, first, begin, width - begin, panel, LANES)
            expected = values[np.minimum(np.arange(first, first + LANES), rows - 1), begin:].T
            np.testing.assert_array_equal(panel[:, LANES : 2 * LANES], expected)
            assert np.isnan(panel[:, :LANES]).all()


def test_every_float16_in_a_panel() -> None:
    width = (1 << 16) // LANES - 1  # odd
    halves = np.arange(LANES * width, dtype=np.uint16).reshape(LANES, width)
    halves[(halves & 0x7C00 == 0x7C00) & (halves & 0x3FF != 0)] |= 0x200  # quiet NaN
    panel = poisoned(width, COLUMNS)
    widen(halves.view(np.int16), 0, 0, width, panel, 0)
    expected = halves.view(np.float16).astype(np.float32).T
    np.testing.assert_array_equal(panel[:, :LANES].view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))


@pytest.mark.parametrize("size", [0.1, 10.0, 300.0])
def test_tiles_of_a_softmax(rng: np.random.Generator, size: float) -> None:
    """Three tiles, the last one with keys that some queries do not see: their scores are NaN here."""
    keys, query = 50, 50 - COLUMNS // 2
    scores = (size * normal(rng, keys, COLUMNS)).astype(np.float32)
    seen = np.arange(keys)[:, None] <= query + np.arange(COLUMNS)
    scores[~seen] = np.nan
    state = np.zeros(3 * COLUMNS, np.float32)
    state[:COLUMNS] = LOWEST
    weights = np.zeros((keys, COLUMNS))
    for first, stop in ((0, 1), (1, 20), (20, keys)):
        tile = scores[first:stop].copy()
        softmax(tile, stop - first, first, query, state)
        weights *= state[2 * COLUMNS :]
        weights[first:stop] = tile
    wide = np.where(seen, scores.astype(np.float64), -np.inf)
    expected = np.exp(wide - wide.max(axis=0))
    assert (weights[~seen] == 0).all()
    np.testing.assert_array_equal(state[:COLUMNS], np.where(seen, scores, -np.inf).max(axis=0))
    np.testing.assert_allclose(weights, expected, rtol=tolerance(70) + 3 * size * 2.0**-22, atol=1e-36)
    np.testing.assert_allclose(state[COLUMNS : 2 * COLUMNS], weights.sum(axis=0), rtol=tolerance(2 * keys))


@pytest.mark.skipif(not X86 or "NUMBA_CPU_NAME" in os.environ, reason="processors of this kind, and only once")
@pytest.mark.parametrize(
    ("name", "features", "lanes"),
    [("haswell", "+avx,+avx2,+fma,+f16c", 8), pytest.param("x86-64", "+sse2", 4, marks=pytest.mark.slow)],
)
def test_the_vectors_of_other_processors(name: str, features: str, lanes: int) -> None:
    if "avx2" in features and not numba.core.codegen.get_host_cpu_features().count("+avx2"):
        pytest.skip("this processor has no AVX2")
    settings = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "EXPECTED_LANES": str(lanes)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env=os.environ | settings,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif("EXPECTED_LANES" not in os.environ, reason="run by the test above")
def test_lanes() -> None:
    assert os.environ["EXPECTED_LANES"] == str(LANES)
