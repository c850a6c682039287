"""The projections of a model: their prepacked layouts, and the GEMV kernel that computes each."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numba_atomflow.errors import BackendError
from numba_atomflow.ops.cuda.gemv.kernels import make_add, make_project, make_store, make_swiglu, projection_kernel
from numba_atomflow.ops.cuda.gemv.plan import GemvPlan, choose_plan
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.ops.cuda.runtime.spec import Planned
from numba_atomflow.ops.formats import FP8_E4M3, WeightFormat

PROJECTIONS = ("qkv", "o", "gate_up", "down", "lm_head")
MAX_GEMV_WIDTH = 8  # N of `mma.m16n8k16`


class ModelSizes(Protocol):
    """The sizes of a model that its projections depend on: those of a `ModelGeometry`."""

    @property
    def hidden(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def q_dim(self) -> int: ...
    @property
    def kv_dim(self) -> int: ...
    @property
    def ffn(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def tied_embeddings(self) -> bool: ...
    @property
    def pre_norm(self) -> bool: ...
    @property
    def post_norm(self) -> bool: ...
    @property
    def hidden_act(self) -> str: ...


def projection_layouts(
    sizes: ModelSizes, chip: Chip, *, head: WeightFormat = FP8_E4M3, separate_rope: bool = False, k_tile: int = 0
) -> dict[str, PrepackedLayout]:
    """The prepacked layout of each kind of projection, and of the embedding.

    Args:
        head: format of the LM head; all other projections are FP8.
        separate_rope: the QKV kernel does not rotate, so that its weights need not pair the rows of a rotation.
        k_tile: groups along K of a k-tile; 0: all of them.
    """
    g = sizes
    rotated = 0 if separate_rope else g.head_dim // 2

    def layout(out_features: int, in_features: int, half: int = 0, weights: WeightFormat = FP8_E4M3) -> PrepackedLayout:
        return PrepackedLayout(out_features, in_features, half, chip.native(weights), k_tile)

    return {
        "embedding": layout(g.vocabulary, g.hidden, weights=head if g.tied_embeddings else FP8_E4M3),
        "qkv": layout(g.q_dim + 2 * g.kv_dim, g.hidden, rotated),
        "o": layout(g.hidden, g.q_dim),
        "gate_up": layout(2 * g.ffn, g.hidden, g.ffn),
        "down": layout(g.hidden, g.ffn),
        "lm_head": layout(g.vocabulary, g.hidden, weights=head),
    }


def kind_of(part: str) -> str:
    """The kind of a part of the checkpoint, such as ``layer.3.qkv`` or ``vocabulary``."""
    kind = part.rpartition(".")[2]
    return "lm_head" if kind == "vocabulary" else kind


@dataclass(frozen=True)
class Projections:
    """The GEMV kernels of a model on a chip.

    Attributes:
        layouts: by kind. dependent: programmatic dependent launch.
    """

    sizes: ModelSizes
    chip: Chip
    layouts: Mapping[str, PrepackedLayout]
    dependent: bool

    def plan(self, kind: str, tokens: int) -> GemvPlan:
        """The tiling of a projection for so many tokens."""
        return choose_plan(self.layouts[kind], tokens, self.chip)

    def shared_bytes(self, tokens: int) -> int:
        """The most shared memory that one of the kernels takes."""
        return max(self.plan(kind, tokens).shared_bytes for kind in PROJECTIONS)

    def kernel(self, kind: str, tokens: int, make_qkv: Callable[..., Any], name: str | None = None) -> Planned:
        """The kernel of a projection, called ``<kind>_x<tokens>`` unless it has a `name`.

        Args:
            make_qkv: the factory for the QKV projection: with RoPE and the KV cache, or `make_store`, which a model
                without norms before projections needs.
        """
        g = self.sizes
        factory: Callable[..., Any]
        options: dict[str, object] = {"eps": g.norm_eps}
        match kind:
            case "qkv":
                factory = make_qkv
                if factory is make_store:
                    options |= {"norm": g.pre_norm}
                else:
                    options |= {"heads": g.heads, "kv_heads": g.kv_heads}
            case "gate_up":
                factory = make_swiglu
                options |= {"y_pitch": self.layouts["down"].padded_in_features}
                options |= {"norm": g.pre_norm, "gelu": g.hidden_act != "silu"}
            case "lm_head":
                factory = make_store
            case _:
                factory, options = make_project if g.post_norm else make_add, {}
        name = name or f"{kind}_x{tokens}"
        return projection_kernel(name, factory, self.plan(kind, tokens), self.chip.sms, self.dependent, **options)


def fitting_widths(
    widths: Iterable[int], shared_bytes: Callable[[int], int], sizes: ModelSizes, chip: Chip
) -> tuple[int, ...]:
    """The GEMV widths whose kernels fit into the chip's shared memory.

    Args:
        shared_bytes: what the kernels of a width need.

    Raises:
        BackendError: none fits.
    """
    fitting = tuple(width for width in widths if shared_bytes(width) <= chip.shared_bytes)
    if not fitting:
        raise BackendError(
            f"A token of this model (ffn {sizes.ffn}) needs more than the {chip.shared_bytes // 1024} KB of "
            "shared memory that this GPU has; use --backend cpu."
        )
    return fitting
