"""Seconds that a cost model predicts for an H200, and the targets: written before anything was measured.

The model is a sum over kernels. A GEMM takes the longer of its arithmetic (groups of 128 along K, spread evenly over
all SMs) and of reading its weights, plus a constant for start, pipeline fill and epilogue. docs/prompts.md explains
the constants, which come from experiments with single kernels, and has the table that `predictions` makes.
"""

from dataclasses import dataclass

from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.presets import PRESETS
from prefill_bench.cases import PROJECTIONS, Case

SMS = 132
GEMM_GROUP = {16: 0.40e-6, 32: 0.43e-6, 64: 0.50e-6, 128: 0.70e-6, 256: 1.40e-6}  # 128 rows x tokens x 128 of K
FP8_GROUP = {16: 0.35e-6, 32: 0.36e-6, 64: 0.38e-6, 128: 0.54e-6, 256: 0.81e-6}  # with FP8 activations: from L2
GEMM_START = 3.2e-6  # of a kernel alone: launch, pipeline fill, epilogue
SHARED_TILES = 2.3e-6  # partial sums of tiles that CTAs share, and their fix-up
WEIGHT_BANDWIDTH = 4.0e12  # bytes per second of weights through a GEMM kernel
STREAM_BANDWIDTH = 4.0e12  # of kernels that read and write activations
ATTENTION_BLOCK = 2.8e-6  # 128 queries x 128 keys x heads of 128, per CTA
ATTENTION_START = 4.0e-6
NORM_START = 2.0e-6
OVERLAP = 1.0e-6  # that programmatic dependent launch saves per kernel
KERNELS_PER_LAYER = 7
CHUNK = 2048
HOST = 150e-6  # from the call to the first launch, and from the last kernel to the token


# --- predictions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """A projection [out_features, in_features]."""

    out_features: int
    in_features: int

    def seconds(self, tokens: int, groups: dict[int, float]) -> float:
        """Of one kernel with the best tile for `tokens` tokens. `groups`: seconds of a group by tokens of a tile."""
        reading = self.out_features * self.in_features * (1 + 4 / 128) / WEIGHT_BANDWIDTH
        times = [
            max(self._arithmetic(tokens, tile, group), reading)
            for tile, group in groups.items()
            if tile <= max(16, tokens)
        ]
        return GEMM_START + min(times)

    def _arithmetic(self, tokens: int, tile: int, group: float) -> float:
        tiles = -(-self.out_features // 128) * -(-tokens // tile)
        k_groups = -(-self.in_features // 128)
        shared = SHARED_TILES if tiles % SMS else 0.0
        return -(-tiles * k_groups // SMS) * group + shared


def projection(geometry: ModelGeometry, kind: str) -> Projection:
    """A projection of a model by its name."""
    g = geometry
    match kind:
        case "qkv":
            return Projection(g.q_dim + 2 * g.kv_dim, g.hidden)
        case "o":
            return Projection(g.hidden, g.q_dim)
        case "gate_up":
            return Projection(2 * g.ffn, g.hidden)
        case "down":
            return Projection(g.hidden, g.ffn)
    raise ValueError(f"there is no projection {kind}")


def attention_seconds(geometry: ModelGeometry, tokens: int, position: int = 0) -> float:
    """Of one kernel: `tokens` queries from `position` on, in tiles of 128, the longest first."""
    block = ATTENTION_BLOCK * geometry.head_dim / 128
    keys = [-(-(position + last) // 128) for last in (min(i + 128, tokens) for i in range(0, tokens, 128))]
    blocks = geometry.heads * sum(keys)
    return ATTENTION_START + block * max(blocks / SMS, *keys)


def layer_seconds(geometry: ModelGeometry, tokens: int, position: int = 0, *, fp8: bool = False) -> float:
    """Of a layer's kernels in a chunk."""
    groups = FP8_GROUP if fp8 else GEMM_GROUP
    gemms = sum(projection(geometry, kind).seconds(tokens, groups) for kind in PROJECTIONS)
    norms = 2 * (NORM_START + tokens * geometry.hidden * (4 + 2) / STREAM_BANDWIDTH)
    attention = attention_seconds(geometry, tokens, position)
    quantizing = NORM_START - OVERLAP + tokens * geometry.ffn * (2 + 1) / STREAM_BANDWIDTH if fp8 else 0.0
    return gemms + norms + quantizing + attention - KERNELS_PER_LAYER * OVERLAP


def ttft_seconds(geometry: ModelGeometry, tokens: int, *, fp8: bool = False) -> float:
    """Of a whole prompt on the GEMM path, everything included."""
    chunks = [(start, min(CHUNK, tokens - start)) for start in range(0, tokens, CHUNK)]
    layers = geometry.layers * sum(layer_seconds(geometry, count, start, fp8=fp8) for start, count in chunks)
    return layers + geometry.vocabulary * geometry.hidden * (1 + 4 / 128) / 4.4e12 + HOST


def predicted_seconds(case: Case) -> float | None:
    """Of a case, or None where the model has nothing to say."""
    geometry = PRESETS.get(case.model)
    if geometry is None:
        return None
    match case.part:
        case "projections":
            return projection(geometry, case.subject).seconds(case.tokens, GEMM_GROUP)
        case "attention":
            starts = range(0, case.tokens, CHUNK)
            return sum(attention_seconds(geometry, min(CHUNK, case.tokens - start), start) for start in starts)
        case "ttft" if case.subject in ("gemm", "fp8"):
            return ttft_seconds(geometry, case.tokens, fp8=case.subject == "fp8")
    return None


# --- targets ---------------------------------------------------------------------------------------------------------

_TTFT = {
    ("llama-3.2-3b", "gemm", 16): 1.6e-3,
    ("llama-3.2-3b", "gemm", 512): 7e-3,
    ("llama-3.2-3b", "gemm", 4096): 45e-3,
    ("llama-3.2-3b", "gemm", 32768): 600e-3,
    ("llama-3.1-8b", "gemm", 512): 13e-3,
    ("llama-3.1-8b", "gemm", 4096): 100e-3,
    ("llama-3.2-3b", "fp8", 4096): 30e-3,
    ("llama-3.1-8b", "fp8", 4096): 62e-3,
}
_PROJECTION_RATIOS = {512: 0.95, 2048: 1.0, 4096: 1.0}  # to cuBLAS's fp16
_ATTENTION_RATIO = 0.85  # to flash attention
_LARGE_MODELS = ("llama-3.2-3b", "llama-3.1-8b")  # that the targets of kernels are for


def target_seconds(case: Case) -> float | None:
    """The most seconds to the first token; None where there is no target."""
    return _TTFT.get((case.model, case.subject, case.tokens)) if case.part == "ttft" else None


def target_ratio(case: Case) -> float | None:
    """The least ratio to the peer's speed; None where there is no target."""
    if case.model not in _LARGE_MODELS:
        return None
    match case.part:
        case "projections":
            return _PROJECTION_RATIOS.get(case.tokens)
        case "attention":
            return _ATTENTION_RATIO
    return None
