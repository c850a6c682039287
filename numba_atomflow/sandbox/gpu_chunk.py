"""A chunk of one prompt on the GEMM path: the launches of a step of many tokens of one sequence."""

from collections.abc import Callable
from typing import Any

from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.memory.view import View
from numba_atomflow.ops.cuda.attention.copy_blocks import CopyBlocksArguments
from numba_atomflow.ops.cuda.attention.prefill import PrefillAttentionArguments
from numba_atomflow.ops.cuda.gemm.arguments import GemmAddArguments, GemmQkvArguments, GemmSwigluArguments
from numba_atomflow.ops.cuda.prefill.buckets import bucket_for
from numba_atomflow.ops.cuda.prefill.kernels import PrefillKernels
from numba_atomflow.ops.cuda.runtime.launch import DeviceArray
from numba_atomflow.ops.cuda.runtime.spec import Planned
from numba_atomflow.ops.cuda.token.embedding import EmbedChunkArguments
from numba_atomflow.ops.cuda.token.rms_norm import RmsNormTilesArguments
from numba_atomflow.sandbox.gpu_kernels import CHUNK_INPUTS, SandboxKernels

Launcher = Callable[[Planned, tuple[DeviceArray | int, ...]], Any]


class ChunkLaunches:
    """Args:
    geometry, kernels: of the model.
    view: the arena's view of a name.
    launch: makes a launch of a kernel with arguments.
    """

    def __init__(
        self, geometry: ModelGeometry, kernels: SandboxKernels, view: Callable[[str], View], launch: Launcher
    ) -> None:
        if kernels.prefill is None:
            raise ValueError("these kernels have none for chunks of prompts")
        self._geometry, self._kernels, self._view, self._launch = geometry, kernels, view, launch
        self._prefill: PrefillKernels = kernels.prefill
        self._tiles = {name: view(f"tiles.{name}") for name in self._prefill.tiles}

    def kernels(self, tokens: int, block_size: int) -> list[Planned]:
        """The kernels of these launches."""
        kinds = self._prefill.layer_kinds
        return [self._prefill.kernel(kind, tokens) for kind in kinds] + self._kernels.chunk_kernels(block_size)

    def step(self, tokens: int, block_size: int) -> list[Any]:
        """The launches of a chunk of `tokens` tokens, padded to a bucket: embedding and layers."""
        view, bucket = self._view, bucket_for(tokens)
        gather, scatter = self._kernels.chunk_kernels(block_size)
        embed = EmbedChunkArguments(
            weights=view("embedding"),
            tokens=view("chunk.tokens"),
            count=self._input("count"),
            residual=view("residual"),
        )
        launches = [self._launch(self._prefill.kernel("embed", bucket), embed)]
        for i in range(self._geometry.layers):
            blocks = self._blocks(i)
            launches += [
                self._norm(bucket, f"layer.{i}.attention_norm"),
                self._launch(gather, blocks),
                self._qkv(bucket, i),
                self._launch(scatter, blocks),
                self._attention(bucket),
                self._add(bucket, "o", i, "attn_out"),
                self._norm(bucket, f"layer.{i}.ffn_norm"),
                self._gate_up(bucket, i),
                self._add(bucket, "down", i, "intermediate"),
            ]
        return launches

    # --- the kernels of a layer --------------------------------------------------------------------------------------

    def _norm(self, bucket: int, weight: str) -> Any:
        view = self._view
        arguments = RmsNormTilesArguments(residual=view("residual"), norm_weight=view(weight), x=self._tiles["x_norm"])
        return self._launch(self._prefill.kernel("norm", bucket), arguments)

    def _qkv(self, bucket: int, layer: int) -> Any:
        view = self._view
        arguments = GemmQkvArguments(
            **self._gemm("qkv", bucket, layer, "x_norm"),
            count=self._input("count"),
            position=self._input("position"),
            cosines=view("cosines"),
            sines=view("sines"),
            q=view("q"),
            keys=view("chunk.keys"),
            values=view("chunk.values"),
        )
        return self._launch(self._prefill.kernel("qkv", bucket), arguments)

    def _attention(self, bucket: int) -> Any:
        view = self._view
        arguments = PrefillAttentionArguments(
            q=view("q"),
            keys=view("chunk.keys"),
            values=view("chunk.values"),
            position=self._input("position"),
            count=self._input("count"),
            partials=view("prefill.partials"),
            counters=view("prefill.counters"),
            out=self._tiles["attn_out"],
        )
        return self._launch(self._prefill.kernel("attention", bucket), arguments)

    def _gate_up(self, bucket: int, layer: int) -> Any:
        inputs = self._gemm("gate_up", bucket, layer, "x_norm")
        arguments = GemmSwigluArguments(**inputs, intermediate=self._tiles["intermediate"])
        return self._launch(self._prefill.kernel("gate_up", bucket), arguments)

    def _add(self, bucket: int, kind: str, layer: int, x: str) -> Any:
        arguments = GemmAddArguments(**self._gemm(kind, bucket, layer, x), residual=self._view("residual"))
        return self._launch(self._prefill.kernel(kind, bucket), arguments)

    def _gemm(self, kind: str, bucket: int, layer: int, x: str) -> dict[str, Any]:
        """The arguments that all projections share."""
        return {
            "weights": self._view(f"layer.{layer}.{kind}"),
            "x": self._tiles[x],
            "partials": self._view("prefill.sums"),
            "token_tiles": self._prefill.token_tiles(kind, bucket),
        }

    def _blocks(self, layer: int) -> CopyBlocksArguments:
        view = self._view
        return CopyBlocksArguments(
            keys=view("paged_kv").index(layer, 0),
            values=view("paged_kv").index(layer, 1),
            table_row=self._input("table_row"),
            block_table=view("block_table"),
            position=self._input("position"),
            count=self._input("count"),
            own_keys=view("chunk.keys"),
            own_values=view("chunk.values"),
        )

    def _input(self, name: str) -> View:
        return self._view("chunk.inputs").index(CHUNK_INPUTS.index(name))
