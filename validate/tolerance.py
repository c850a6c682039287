"""Tolerances: the rounding error allowed between two correct implementations, by op, propagated through the layers.

Errors are relative L2 errors |a - b| / |b| of a probe's row (one position). Roundings are modelled as independent:
variances add, and a tolerance is `LAMBDA` standard deviations. docs/validation.md has the derivation.

1. A sum of K products in float32 has K roundings. Their error is at most LAMBDA * sqrt(K) * u, with u = 2^-24 and
   probability 1 - 2 exp(-LAMBDA^2 / 2) for one number (Higham and Mary, 2019); a row has hundreds of numbers.
2. A value that is stored in a narrower format has one more rounding, with that format's u.
3. Softmax amplifies: a relative error e of a score s becomes a relative error s * e of its weight. Errors of q and k
   inside the layer are multiplied by max |s| of the reference.
4. Residual additions x + y: the variances of x and y are weighted by their squared magnitudes in the reference. Where y
   cancels x, the relative error grows.
5. A norm's weights may damp the few channels that dominate a stream (massive activations): an error that is spread over
   all channels then grows relative to the result.
6. Otherwise a sublayer does not amplify the relative error of its input.

Both implementations round: 1 and 2 apply to each.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.geometry import GROUP, ModelGeometry, rope_inverse_frequencies
from numba_atomflow.validate.isolation import Isolation, layer_input
from numba_atomflow.validate.precision import FLOAT32, Precision
from numba_atomflow.validate.probes import Rows
from numba_atomflow.validate.reference import Reference

LAMBDA = 4.0
EXP_ROUNDINGS = 70  # the CPU kernels' exponential has a relative error of 5e-7 = 8.4 u, or 70 roundings of variance u^2
MAX_TOLERANCE = 1.0  # a relative error of 1 is no agreement

Variance = NDArray[np.float64]  # [positions]

_U2 = FLOAT32**2
_TINY = np.finfo(np.float64).tiny  # lower bound of divisors


def tolerances(reference: Reference, other: Precision, isolation: Isolation) -> dict[str, NDArray[np.float64]]:
    """The tolerance of the relative L2 error at each position, by probe name.

    Args:
        reference: its precision and magnitudes.
        other: precision of the implementation under test.
        isolation: what gets the reference's inputs, so that errors do not propagate between layers, or between ops.
    """
    model = _ErrorModel(reference.geometry, (reference.precision, other), len(reference.tokens))
    tensors = reference.tensors
    variances: dict[str, Variance] = {"embedding": model.embedding()}
    stream = variances["embedding"]
    for i in range(reference.geometry.layers):
        if isolation != "none":
            stream = np.zeros_like(stream)
        residual_in, residual_mid, residual_out = (tensors[name] for name in _stream_of(i))
        without = np.ones_like(stream)
        norms = (without, without)
        if reference.geometry.pre_norm:
            norms = (
                _norm_growth(residual_in, tensors[f"layer.{i}.input_norm"]),
                _norm_growth(residual_mid, tensors[f"layer.{i}.ffn_norm"]),
            )
        own = isolation == "ops"
        layer, stream = model.layer(
            stream, _max_scores(reference, i), norms, residual_in, residual_mid, residual_out, each_op=own
        )
        variances |= {f"layer.{i}.{name}": variance for name, variance in layer.items()}
    if isolation != "none":
        stream = np.zeros_like(stream)
    last = tensors[layer_input(reference.geometry.layers)]
    variances["final_norm"] = stream * _norm_growth(last, tensors["final_norm"]) + model.norm()
    variances["logits"] = variances["final_norm"] + model.projection(reference.geometry.hidden)
    return {name: np.minimum(LAMBDA * np.sqrt(variance), MAX_TOLERANCE) for name, variance in variances.items()}


def _stream_of(layer: int) -> tuple[str, str, str]:
    """Probes of the residual stream: before a layer, between its sublayers, after it."""
    return layer_input(layer), f"layer.{layer}.after_attention", f"layer.{layer}.output"


class _ErrorModel:
    """Variances of the rounding errors of each op, of both implementations, per position."""

    def __init__(self, geometry: ModelGeometry, sides: Sequence[Precision], positions: int) -> None:
        self.geometry, self.sides = geometry, sides
        self.positions = np.arange(positions, dtype=np.float64)

    def stored(self, *fields: str) -> float:
        """One rounding of each of these stored values."""
        units = [float(getattr(side, field)) for side in self.sides for field in fields]
        return float(np.sum(np.square(units)))

    def chain(self, roundings: float) -> float:
        """A sequence of float32 operations."""
        return len(self.sides) * roundings * _U2

    def embedding(self) -> Variance:
        """One multiplication by a scale."""
        return np.full_like(self.positions, self.chain(1) + self.stored("weights"))

    def norm(self) -> float:
        """A sum of squares over the hidden size, square root, division and two products."""
        return self.chain(self.geometry.hidden + 4) + self.stored("x_norm")

    def projection(self, in_features: int) -> float:
        """A sum of in_features products, and one product with a scale per group."""
        return self.chain(in_features + -(-in_features // GROUP)) + self.stored("weights")

    def angles(self) -> Variance:
        """Float32 RoPE angles: frequency f = base^-x has an error of 2 + x ln(base) units, times the position."""
        if not any(side.float32_angles for side in self.sides):
            return np.zeros_like(self.positions)
        f = np.maximum(rope_inverse_frequencies(self.geometry), _TINY)  # 0 where nothing is rotated
        return self.positions**2 * float(np.mean((f * (2 - np.log(np.minimum(f, 1.0)))) ** 2)) * _U2

    def layer(
        self,
        stream: Variance,
        max_score: Variance,
        norms: tuple[Variance, Variance],
        residual_in: Rows,
        residual_mid: Rows,
        residual_out: Rows,
        *,
        each_op: bool,
    ) -> tuple[dict[str, Variance], Variance]:
        """Variances of all probes of a layer, and of the residual stream after it.

        Args:
            stream: variance of the residual stream.
            max_score: max |score| of each position.
            norms: growth of a variance in each of the two norms.
            residual_in, residual_mid, residual_out: the stream before, between and after the two sublayers.
            each_op: every op gets the reference's inputs, rounded to what it reads.
        """
        g = self.geometry
        norm, project = self.norm(), self.projection(g.hidden)
        head_norm = self.chain((g.q_dim if g.qk_norm_of_all_heads else g.head_dim) + 4) if g.qk_norm else 0.0
        post_norm = self.chain(g.hidden + 4) if g.post_norm else 0.0
        rotated = norm + project + head_norm + self.chain(3) + self.angles()
        q, k, v = rotated + self.stored("q"), rotated + self.stored("k"), norm + project + self.stored("v")
        q_in, k_in, v_in = (self.stored("q"), self.stored("k"), self.stored("v")) if each_op else (q, k, v)
        attention = (
            np.maximum(max_score, 1.0) ** 2 * (q_in + k_in + self.chain(g.head_dim))
            + v_in
            + self.chain(1) * (2 * (self.positions + 1) + EXP_ROUNDINGS)
            + self.stored("probabilities", "attn_out")
        )
        input_error = stream * norms[0]
        attention_in = np.full_like(stream, self.stored("attn_out")) if each_op else input_error + attention
        added = attention_in + self.projection(g.q_dim) + post_norm
        after_attention = self.add(stream, residual_in, added, residual_mid)
        mid = np.zeros_like(after_attention) if each_op else after_attention
        ffn = 2 * (norm + project) + self.chain(EXP_ROUNDINGS) + self.stored("intermediate")
        mlp = (self.stored("intermediate") if each_op else ffn) + self.projection(g.ffn) + post_norm
        mid_error = mid * norms[1]
        output = self.add(mid, residual_mid, mid_error + mlp, residual_out)
        # The MLP output is read as the difference of two float32 values of the stream.
        difference = _U2 * _squares(residual_out) / np.maximum(_squares(residual_out - residual_mid), _TINY)
        return {
            "input_norm": input_error + norm,
            "q": input_error + q,
            "k": input_error + k,
            "v": input_error + v,
            "attention": input_error + attention,
            "after_attention": after_attention,
            "ffn_norm": mid_error + norm,
            "ffn": mid_error + ffn,
            "mlp": mid_error + mlp + difference,
            "output": output,
        }, output

    def add(self, stream: Variance, x: Rows, added: Variance, total: Rows) -> Variance:
        """Variance of total = x + y, from the variances of x and y."""
        whole = np.maximum(_squares(total), _TINY)
        return (_squares(x) * stream + _squares(total - x) * added) / whole + self.chain(1)


def _norm_growth(x: Rows, x_norm: Rows) -> Variance:
    """Growth of the relative variance of an error that is spread over all channels, in a norm: at least 1."""
    direction = x / np.maximum(np.sqrt(_squares(x) / x.shape[1]), _TINY)[:, None]
    weights = np.sum(x_norm * direction, axis=0) / np.maximum(np.sum(direction**2, axis=0), _TINY)
    growth: Variance = np.maximum(np.sum(weights**2) / np.maximum(_squares(x_norm), _TINY), 1.0)
    return growth


def _squares(rows: Rows) -> NDArray[np.float64]:
    squares: NDArray[np.float64] = np.sum(rows.astype(np.float64) ** 2, axis=1)
    return squares


def _max_scores(reference: Reference, layer: int) -> NDArray[np.float64]:
    """max |q k| / sqrt(head_dim) over all heads and visible keys, per position."""
    g = reference.geometry
    q = reference.tensors[f"layer.{layer}.q"].reshape(-1, g.kv_heads, g.gqa_ratio, g.head_dim)
    k = reference.tensors[f"layer.{layer}.k"].reshape(-1, g.kv_heads, g.head_dim)
    max_scores = np.zeros(len(q))
    for head in range(g.kv_heads):
        for query in range(g.gqa_ratio):
            scores = np.abs(np.tril(q[:, head, query] @ k[:, head].T))
            max_scores = np.maximum(max_scores, scores.max(axis=1) / np.sqrt(g.head_dim))
    return max_scores
