"""How far apart two sound implementations may be: rounding errors, counted op by op and carried through the layers.

Errors are relative: |a - b| / |b| over a probe's row (one position). They add as independent ones do, by their squares;
so this module adds variances, and a tolerance is `LAMBDA` times the root of a sum. docs/validation.md has the story.

1. A sum of K products in float32 has K roundings. As independent errors they leave at most LAMBDA * sqrt(K) * u, with
   u = 2^-24 and probability 1 - 2 exp(-LAMBDA^2 / 2) for a single number (Higham and Mary, 2019); a row has hundreds.
2. A value that is stored in a narrower format is rounded once more, by that format's u.
3. A softmax turns a relative error e in a score s into a relative error s * e of its weight: what q and k have
   gathered inside the layer counts max |s| times, scores being the reference's.
4. A residual stream is x + y: errors of its parts weigh as much as the parts, by their squares. Where y cancels x, the
   relative error grows. Magnitudes are the reference's.
5. A norm's weights may damp the few channels that make up most of a stream (massive activations): the error, spread
   over all channels, then grows relative to what is left.
6. Otherwise an error that enters a sublayer with the stream leaves it no larger, relative to what the sublayer adds.

Both implementations round: 1 and 2 count for each of them.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.geometry import GROUP, ModelGeometry, rope_inverse_frequencies
from numba_atomflow.validate.precision import FLOAT32, Precision
from numba_atomflow.validate.probes import Rows, layer_input
from numba_atomflow.validate.reference import Reference

LAMBDA = 4.0
EXP_ROUNDINGS = 70  # the CPU kernels' exponential is good to 5e-7, that is 8.4 u: as many as this, by their squares
LARGEST = 1.0  # a relative error of 1 is no agreement, whatever the count says

Variance = NDArray[np.float64]  # [positions]

_U2 = FLOAT32**2
_TINY = np.finfo(np.float64).tiny  # instead of zero, to divide by


def tolerances(reference: Reference, other: Precision, isolate: bool) -> dict[str, NDArray[np.float64]]:
    """The relative L2 error allowed at each position, by probe name.

    Args:
        reference: with its precision and its magnitudes.
        other: precision of the implementation under test.
        isolate: every layer gets the reference's input, so that errors do not cross from layer to layer.
    """
    count = _Count(reference.geometry, (reference.precision, other), len(reference.tokens))
    tensors = reference.tensors
    variances: dict[str, Variance] = {"embedding": count.embedding()}
    stream = variances["embedding"]
    for i in range(reference.geometry.layers):
        if isolate:
            stream = np.zeros_like(stream)
        x, middle, leaving = (tensors[name] for name in _stream_of(i))
        norms = _norm_growth(x, tensors[f"layer.{i}.input_norm"]), _norm_growth(middle, tensors[f"layer.{i}.ffn_norm"])
        layer, stream = count.layer(stream, _largest_scores(reference, i), norms, x, middle, leaving)
        variances |= {f"layer.{i}.{name}": variance for name, variance in layer.items()}
    if isolate:
        stream = np.zeros_like(stream)
    last = tensors[layer_input(reference.geometry.layers)]
    variances["final_norm"] = stream * _norm_growth(last, tensors["final_norm"]) + count.norm()
    variances["logits"] = variances["final_norm"] + count.projection(reference.geometry.hidden)
    return {name: np.minimum(LAMBDA * np.sqrt(variance), LARGEST) for name, variance in variances.items()}


def _stream_of(layer: int) -> tuple[str, str, str]:
    """The residual stream before, in the middle of, and after a layer."""
    return layer_input(layer), f"layer.{layer}.after_attention", f"layer.{layer}.output"


class _Count:
    """Variances of the roundings of each op, over both sides, per position."""

    def __init__(self, geometry: ModelGeometry, sides: Sequence[Precision], positions: int) -> None:
        self.geometry, self.sides = geometry, sides
        self.positions = np.arange(positions, dtype=np.float64)

    def stored(self, *fields: str) -> float:
        """One rounding for each of these stored values."""
        units = [float(getattr(side, field)) for side in self.sides for field in fields]
        return float(np.sum(np.square(units)))

    def chain(self, roundings: float) -> float:
        """Float32 operations, one after the other."""
        return len(self.sides) * roundings * _U2

    def embedding(self) -> Variance:
        return np.full_like(self.positions, self.chain(1) + self.stored("weights"))

    def norm(self) -> float:
        return self.chain(self.geometry.hidden + 4) + self.stored("normed")

    def projection(self, columns: int) -> float:
        return self.chain(columns + -(-columns // GROUP)) + self.stored("weights")

    def angles(self) -> Variance:
        """Float32 angles: frequency f = base^-x is off by 2 + x ln(base) units, and is multiplied by the position."""
        if not any(side.float32_angles for side in self.sides):
            return np.zeros_like(self.positions)
        f = rope_inverse_frequencies(self.geometry)
        return self.positions**2 * float(np.mean((f * (2 - np.log(np.minimum(f, 1.0)))) ** 2)) * _U2

    def layer(
        self, stream: Variance, peak: Variance, norms: tuple[Variance, Variance], x: Rows, middle: Rows, leaving: Rows
    ) -> tuple[dict[str, Variance], Variance]:
        """Variances of all probes of a layer, and of the stream that leaves it.

        Args:
            stream: variance of the residual stream.
            peak: the largest score of each position.
            norms: how much a variance grows in each of the two norms.
            x, middle, leaving: the stream before, between and after the two sublayers.
        """
        g = self.geometry
        norm, project = self.norm(), self.projection(g.hidden)
        head_norm = self.chain(g.head_dim + 4) if g.qk_norm else 0.0
        rotated = norm + project + head_norm + self.chain(3) + self.angles()
        q, k, v = rotated + self.stored("q"), rotated + self.stored("k"), norm + project + self.stored("v")
        attention = (
            np.maximum(peak, 1.0) ** 2 * (q + k + self.chain(g.head_dim))
            + v
            + self.chain(1) * (2 * (self.positions + 1) + EXP_ROUNDINGS)
            + self.stored("probabilities", "attended")
        )
        entering = stream * norms[0]
        after_attention = self.add(stream, x, entering + attention + self.projection(g.q_dim), middle)
        ffn = 2 * (norm + project) + self.chain(EXP_ROUNDINGS) + self.stored("ffn")
        mlp = ffn + self.projection(g.ffn)
        between = after_attention * norms[1]
        output = self.add(after_attention, middle, between + mlp, leaving)
        # The MLP's share is read as the difference of two float32 values of the stream.
        difference = _U2 * _squares(leaving) / np.maximum(_squares(leaving - middle), _TINY)
        return {
            "input_norm": entering + norm,
            "q": entering + q,
            "k": entering + k,
            "v": entering + v,
            "attention": entering + attention,
            "after_attention": after_attention,
            "ffn_norm": between + norm,
            "ffn": between + ffn,
            "mlp": between + mlp + difference,
            "output": output,
        }, output

    def add(self, stream: Variance, x: Rows, added: Variance, total: Rows) -> Variance:
        """Variance of total = x + y, from those of x and y."""
        whole = np.maximum(_squares(total), _TINY)
        return (_squares(x) * stream + _squares(total - x) * added) / whole + self.chain(1)


def _norm_growth(x: Rows, normed: Rows) -> Variance:
    """How much larger, relatively, an error that is spread over all channels is behind a norm: at least 1."""
    direction = x / np.maximum(np.sqrt(_squares(x) / x.shape[1]), _TINY)[:, None]
    weights = np.sum(normed * direction, axis=0) / np.maximum(np.sum(direction**2, axis=0), _TINY)
    growth: Variance = np.maximum(np.sum(weights**2) / np.maximum(_squares(normed), _TINY), 1.0)
    return growth


def _squares(rows: Rows) -> NDArray[np.float64]:
    squares: NDArray[np.float64] = np.sum(rows.astype(np.float64) ** 2, axis=1)
    return squares


def _largest_scores(reference: Reference, layer: int) -> NDArray[np.float64]:
    """max |q k| / sqrt(head_dim) over all heads and visible keys, per position."""
    g = reference.geometry
    q = reference.tensors[f"layer.{layer}.q"].reshape(-1, g.kv_heads, g.gqa_ratio, g.head_dim)
    k = reference.tensors[f"layer.{layer}.k"].reshape(-1, g.kv_heads, g.head_dim)
    largest = np.zeros(len(q))
    for head in range(g.kv_heads):
        for part in range(g.gqa_ratio):
            scores = np.abs(np.tril(q[:, head, part] @ k[:, head].T))
            largest = np.maximum(largest, scores.max(axis=1) / np.sqrt(g.head_dim))
    return largest
