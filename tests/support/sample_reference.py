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
    reached = np.cumsum(masses[order])
    kept = int(reached[-1])
    if some_k and params.top_k < len(order):
        kept = int(reached[params.top_k - 1])
    if params.top_p < 1.0:
        need = min(max(math.ceil(params.top_p * float(kept)), 1), kept)
        kept = min(kept, int(reached[np.searchsorted(reached, need)]))
    if params.min_p > 0.0:
        kept = min(kept, int(masses[masses >= params.min_p * UNIT].sum()))
    need = min(int(uniform(seed, counter) * float(kept)) + 1, kept)
    return int(order[np.searchsorted(reached, need)])


DISTRIBUTIONS = ("flat", "peaked", "one", "equal", "tail")


def logits_of(kind: str, vocabulary: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Flat: what random weights give. Peaked: what a text gives. One: nearly sure. Tail: much mass in what is small."""
    normal = rng.standard_normal(vocabulary)
    spread = {"flat": 1.0, "peaked": 4.0, "one": 1.0, "equal": 0.0, "tail": 0.1}[kind]
    logits = (spread * normal).astype(np.float32) + np.float32(0.0)  # no -0
    if kind in ("one", "tail"):
        logits[rng.integers(vocabulary)] = {"one": 25.0, "tail": 12.0}[kind]
    return logits
