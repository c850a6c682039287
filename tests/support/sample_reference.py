"""The sampling kernel's arithmetic (ops/cuda/token/sample.py) in NumPy: integer mass, for any order of threads."""

import math

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.sampling import SamplingParams, uniform

UNIT = 2.0**44  # of the most likely token's mass


def device_token(logits: NDArray[np.float32], params: SamplingParams, seed: int, counter: int) -> int:
    """The token that the kernel takes, from logits float32 [V] after the repetition penalty."""
    temperature = params.temperature
    exponents = logits.astype(np.float64) / temperature - float(logits.max()) / temperature
    masses = np.where(exponents > -40.0, np.exp(exponents) * UNIT, 0.0).astype(np.int64)
    some_k = 0 < params.top_k < len(logits)
    by_id = not some_k and params.top_p >= 1.0 and params.min_p <= 0.0
    order = np.arange(len(logits)) if by_id else np.argsort(-logits, kind="stable")
    order = order[masses[order] > 0]
    mass_up_to = np.cumsum(masses[order])
    kept_mass = int(mass_up_to[-1])
    if some_k and params.top_k < len(order):
        kept_mass = int(mass_up_to[params.top_k - 1])
    if params.top_p < 1.0:
        target = min(max(math.ceil(params.top_p * float(kept_mass)), 1), kept_mass)
        kept_mass = min(kept_mass, int(mass_up_to[np.searchsorted(mass_up_to, target)]))
    if params.min_p > 0.0:
        kept_mass = min(kept_mass, int(masses[masses >= params.min_p * UNIT].sum()))
    target = min(int(uniform(seed, counter) * float(kept_mass)) + 1, kept_mass)
    return int(order[np.searchsorted(mass_up_to, target)])


DISTRIBUTIONS = ("flat", "peaked", "one", "equal", "tail")


def logits_of(kind: str, vocabulary: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Flat: as of random weights. Peaked: as of a text. One: one likely token. Tail: much mass in unlikely tokens."""
    normal = rng.standard_normal(vocabulary)
    spread = {"flat": 1.0, "peaked": 4.0, "one": 1.0, "equal": 0.0, "tail": 0.1}[kind]
    logits = (spread * normal).astype(np.float32) + np.float32(0.0)  # no -0
    if kind in ("one", "tail"):
        logits[rng.integers(vocabulary)] = {"one": 25.0, "tail": 12.0}[kind]
    return logits
