"""The kernels of a rank: the persistent kernel for its share of a model, and those that choose a token after it."""

from dataclasses import replace
from functools import cached_property

from numba_atomflow.backends.base import Verification
from numba_atomflow.backends.cuda.decode_path import model_obstacle
from numba_atomflow.backends.cuda.kernels import TOKEN_RING, WIDE_COLUMNS, has_separate_rope, persistent_shape
from numba_atomflow.backends.cuda.plan import weight_buffers
from numba_atomflow.errors import BackendError
from numba_atomflow.memory.plan import Buffer
from numba_atomflow.model.formats import HEAD_FORMATS, HeadFormat
from numba_atomflow.model.sharding import Sharding
from numba_atomflow.ops.cuda.gemv.projections import kind_of, projection_layouts
from numba_atomflow.ops.cuda.layout.prepack import prepack_fp16_kernel, prepack_kernel
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout
from numba_atomflow.ops.cuda.persistent.kernel import persistent_kernel
from numba_atomflow.ops.cuda.persistent.publish import publish_kernel
from numba_atomflow.ops.cuda.persistent.schedule import K_TILE_GROUPS, PersistentShape, RankShape
from numba_atomflow.ops.cuda.persistent.wide_kernel import wide_kernel
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.ops.cuda.runtime.spec import Planned
from numba_atomflow.ops.cuda.token.advance import advance_kernel, post_rows_kernel
from numba_atomflow.ops.cuda.token.argmax import argmax_kernel, argmax_rows_kernel
from numba_atomflow.ops.cuda.token.logprobs import logprobs_kernel
from numba_atomflow.ops.cuda.token.sample import sample_kernel, sample_rows_kernel


class RankKernels:
    """The kernels of any rank: all ranks run the same ones.

    Args:
        chip: of each of the GPUs. head: format of the LM head.
        ranks_per_gpu: that share a GPU, each with its share of the SMs: more than one only to test without a second.

    Raises:
        BackendError: the persistent kernel cannot run the model on such a GPU.
    """

    def __init__(self, sharding: Sharding, chip: Chip, head: HeadFormat = "fp8", *, ranks_per_gpu: int = 1) -> None:
        self.sharding, self.geometry, self.head = sharding, sharding.geometry, head
        self.chip, self.ranks_per_gpu = chip, ranks_per_gpu
        obstacle = model_obstacle(self.geometry, chip, window=None) or self.persistent_shape.refusal()
        if obstacle:
            raise BackendError(
                f"Several GPUs share a model in the persistent kernel alone, and it cannot run because {obstacle}; "
                "use --gpus 1."
            )

    @cached_property
    def layouts(self) -> dict[str, PrepackedLayout]:
        """The prepacked layout of a rank's rows of each kind of projection, and of the embedding."""
        sharding, g = self.sharding, self.geometry
        own = sharding.rank_geometry
        rows = {
            "embedding": sharding.vocabulary_rows,
            "qkv": own.q_dim + 2 * own.kv_dim,
            "o": sharding.hidden_rows,
            "gate_up": 2 * own.ffn,
            "down": sharding.hidden_rows,
            "lm_head": sharding.vocabulary_rows,
        }
        separate_rope = has_separate_rope(g)
        head = HEAD_FORMATS[self.head]
        whole = projection_layouts(g, self.chip, head=head, separate_rope=separate_rope, k_tile=K_TILE_GROUPS)
        layouts = {kind: replace(layout, out_features=rows[kind]) for kind, layout in whole.items()}
        layouts["gate_up"] = replace(layouts["gate_up"], half=own.ffn)
        return layouts

    def layout_of(self, part: str, rows: int | None = None) -> PrepackedLayout:
        """The prepacked layout of a rank's rows of a part of the checkpoint; or of as many as the last rank has."""
        layout = self.layouts[kind_of(part)]
        return layout if rows is None else replace(layout, out_features=rows)

    @cached_property
    def weight_buffers(self) -> list[Buffer]:
        """A rank's weights, as buffers of its plan."""
        own = self.sharding.rank_geometry
        buffers = weight_buffers(self.geometry, self.layout_of)
        bias = (own.q_dim + 2 * own.kv_dim,)
        return [replace(b, shape=bias) if b.name.endswith(".qkv_bias") else b for b in buffers]

    @cached_property
    def persistent_shape(self) -> PersistentShape:
        """How the persistent kernel is cut for a rank."""
        whole = persistent_shape(self.sharding.rank_geometry, self.layouts, self.chip)
        rank = RankShape(self.sharding.ranks, self.chip.sms, self.geometry.vocabulary)
        return replace(whole, sms=self.chip.sms // self.ranks_per_gpu, rank=rank)

    @cached_property
    def wide_shapes(self) -> dict[int, PersistentShape]:
        """How it is cut for steps of several tokens, by their number: as many as shared memory has room for, with half
        of the inputs of `down` where it has none for all of them.
        """
        shapes = {}
        for columns in WIDE_COLUMNS:
            cuts = (replace(self.persistent_shape, columns=columns, k_halves=halves) for halves in (False, True))
            fitting = next((shape for shape in cuts if shape.refusal() is None), None)
            if fitting is not None:
                shapes[columns] = fitting
        return shapes

    @property
    def most_columns(self) -> int:
        """Most tokens of a step."""
        return max(self.wide_shapes, default=1)

    @property
    def verification(self) -> Verification:
        """How many tokens a step can verify. As on one GPU, speculation must be asked for."""
        if not self.wide_shapes:
            return Verification(1, "shared memory has no room for the inputs of two tokens")
        return Verification(self.most_columns, automatic=False)

    @cached_property
    def wide(self) -> dict[int, Planned]:
        """The persistent kernel for several tokens, by their number; not among `planned`: each is compiled when a
        prompt, or a step that verifies, first needs it.
        """
        return {columns: self._launched(wide_kernel(shape)) for columns, shape in self.wide_shapes.items()}

    @cached_property
    def sampled_rows(self) -> dict[str, Planned]:
        """What samples from several rows of logits, after a step that verifies, by name; on one rank."""
        vocabulary, chip, dependent = self.geometry.vocabulary, self.chip, self.chip.dependent_launch
        kernels = (
            argmax_rows_kernel(vocabulary, chip.sms, dependent),
            sample_rows_kernel(vocabulary, dependent),
            post_rows_kernel(TOKEN_RING, vocabulary, dependent),
        )
        return {kernel.spec.name: kernel for kernel in kernels}

    @cached_property
    def publish(self) -> Planned:
        """What steps under an observer need beside `planned`."""
        return publish_kernel(self.persistent_shape)

    @property
    def traced(self) -> Planned:
        """The persistent kernel that also writes timestamps; not among `planned`, because only a trace needs it."""
        return self._launched(persistent_kernel(replace(self.persistent_shape, trace=True)))

    def _launched(self, planned: Planned) -> Planned:
        """A cooperative launch, except on a shared GPU, where the CTAs of all ranks together are as many as its SMs."""
        return Planned(replace(planned.spec, cooperative=self.ranks_per_gpu == 1), planned.ctas)

    @cached_property
    def planned(self) -> dict[str, Planned]:
        """The kernels that every reply needs, by name."""
        vocabulary, chip, dependent = self.geometry.vocabulary, self.chip, self.chip.dependent_launch
        kernels = [
            prepack_kernel(self.chip.fp8_converter),
            self._launched(persistent_kernel(self.persistent_shape)),
            argmax_kernel(vocabulary, chip.sms, dependent),
            sample_kernel(vocabulary, dependent),
            logprobs_kernel(vocabulary, dependent),
            advance_kernel(TOKEN_RING, sampled=True, dependent=dependent),
        ]
        if not HEAD_FORMATS[self.head].scaled:
            kernels.append(prepack_fp16_kernel())
        return {kernel.spec.name: kernel for kernel in kernels}
