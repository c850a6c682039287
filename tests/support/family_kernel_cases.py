"""The kernels of `ops/cuda/token/family.py` against float64, in the simulator and on a GPU."""

import numpy as np
from kernel_cases import EPS, generator, launch, poisoned, relative_error, within

from numba_atomflow.ops.activation import gelu_reference
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.token import family
from numba_atomflow.ops.rms_norm import rms_norm_reference


def check_add_norm(width: int, tokens: int) -> None:
    """Relative L2 error 1e-6: float32 all the way."""
    rng = generator(width, tokens)
    x, residual = (rng.standard_normal((tokens, width)).astype(np.float32) for _ in range(2))
    weight = rng.uniform(0.5, 1.5, width).astype(np.float32)
    expected = residual.astype(np.float64) + rms_norm_reference(x.astype(np.float64), weight.astype(np.float64), EPS)
    arguments = family.AddNormArguments(x.reshape(-1), weight, residual.reshape(-1))
    launch(family.make_add_norm(width, EPS), tokens, family.THREADS, 0, arguments)
    within("add_norm", relative_error(residual, expected), 1e-6)


def check_tiles(width: int, tokens: int) -> None:
    """Rounded and gated rows: relative L2 error 5e-4, of rounding to float16; padding is zero."""
    rng, tiles = generator(width, tokens), ActivationTiles(width, tokens // 8 * 8 + 8)
    rows = rng.standard_normal((tokens, width)).astype(np.float32)
    whole = ActivationTiles(tiles.blocks * tiles.block_elements, tiles.tokens)
    words = poisoned(tiles.words, dtype=np.uint32)
    launch(
        family.make_round_tiles(tiles), tokens, family.THREADS, 0, family.RoundTilesArguments(rows.reshape(-1), words)
    )
    np.testing.assert_array_equal(whole.unpack(words)[:tokens, :width], rows.astype(np.float16))
    assert (whole.unpack(words)[:tokens, width:] == 0).all()
    gate, up = (rng.standard_normal((tokens, width)).astype(np.float32) for _ in range(2))
    paired = np.stack([gate.reshape(tokens, -1, 8), up.reshape(tokens, -1, 8)], axis=2).reshape(-1)
    words = poisoned(tiles.words, dtype=np.uint32)
    launch(family.make_geglu_tiles(tiles), tokens, family.THREADS, 0, family.GegluTilesArguments(paired, words))
    expected = gelu_reference(gate.astype(np.float64)) * up
    within("GELU to float16", relative_error(whole.unpack(words)[:tokens, :width], expected), 5e-4)
    assert (whole.unpack(words)[:tokens, width:] == 0).all()


def check_cap_logits(count: int, cap: float) -> None:
    """Absolute error 1e-6 of the cap, from logits that it leaves as they are to those that it cuts off."""
    logits = (generator(count).standard_normal(count) * np.exp2(np.linspace(-8, 8, count)) * cap).astype(np.float32)
    logits[:2] = 1e30, -1e30
    expected = cap * np.tanh(logits.astype(np.float64) / cap)
    capped = np.append(logits, np.float32(7e7))  # one more than is asked for
    launch(family.make_cap_logits(cap), 1, family.THREADS, 0, family.CapLogitsArguments(capped, count))
    assert capped[count] == np.float32(7e7)
    np.testing.assert_allclose(capped[:count], expected, rtol=0, atol=1e-6 * cap)
