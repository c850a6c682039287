"""The kernels of `ops/cuda/token/family.py` against float64, in the simulator and on a GPU."""

import numpy as np
from kernel_cases import EPS, generator, launch, relative_error, within

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


def check_cap_logits(count: int, cap: float) -> None:
    """Absolute error 1e-6 of the cap, from logits that it leaves as they are to those that it cuts off."""
    logits = (generator(count).standard_normal(count) * np.exp2(np.linspace(-8, 8, count)) * cap).astype(np.float32)
    logits[:2] = 1e30, -1e30
    expected = cap * np.tanh(logits.astype(np.float64) / cap)
    capped = np.append(logits, np.float32(7e7))  # one more than is asked for
    launch(family.make_cap_logits(cap), 1, family.THREADS, 0, family.CapLogitsArguments(capped, count))
    assert capped[count] == np.float32(7e7)
    np.testing.assert_allclose(capped[:count], expected, rtol=0, atol=1e-6 * cap)
