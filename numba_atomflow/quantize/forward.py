"""The forward pass of calibration: one decoder layer with unquantized weights, in float32.

It uses the kernels of the CPU backend, but not the ops of `model.step`, which need FP8 weights and a KV cache. All
sequences pass one layer before the next layer is read.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.host.threads import max_threads
from numba_atomflow.memory.arena import HostArena
from numba_atomflow.memory.plan import Buffer, plan_memory
from numba_atomflow.model.rope_tables import rope_tables
from numba_atomflow.ops import attention, projection, rms_norm, rope
from numba_atomflow.ops.arguments import bind
from numba_atomflow.quantize.inputs import Inputs

Array = NDArray[np.float32]


class LayerForward:
    """Runs layers on sequences of `tokens` tokens; to be used within `cores_for_blas`."""

    def __init__(self, geometry: ModelGeometry, tokens: int) -> None:
        g = self._geometry = geometry
        shapes = {
            "cosines": (tokens, g.head_dim // 2),
            "sines": (tokens, g.head_dim // 2),
            "x_norm": (tokens, g.hidden),
            "q": (tokens, g.q_dim),
            "keys": (tokens, g.kv_dim),
            "values": (tokens, g.kv_dim),
            "attn_out": (tokens, g.q_dim),
            "ffn": (tokens, g.ffn),
            "scratch": (max_threads(), attention.chunk_scratch(g.head_dim)),
        }
        self._arena = HostArena(
            plan_memory(Buffer("workspace", name, shape, "float32") for name, shape in shapes.items())
        )
        self._x_norm, self._q, self._attn_out = (self._array(name) for name in ("x_norm", "q", "attn_out"))
        self._cache = self._array("keys"), self._array("values")
        self._ffn, self._scratch = self._array("ffn"), self._array("scratch")
        self._tables = self._array("cosines"), self._array("sines")
        for name, table in rope_tables(g, tokens):
            self._array(name.removeprefix("rope."))[:] = table
        self._position = np.zeros(1, np.int64)

    def _array(self, name: str) -> Array:
        return self._arena[name].host_array()

    def run(self, layer: Mapping[str, Array], stream: Array, inputs: Mapping[str, Inputs]) -> None:
        """One sequence through one layer.

        Args:
            layer: its weights by checkpoint part: "qkv" [N, K], "attention_norm" [H], ...
            stream: residual stream [T, H], updated in place.
            inputs: statistics of the inputs of "qkv", "o", "gate_up" and "down", updated.
        """
        self._attend(layer, stream, inputs)
        x_norm = self._norm(stream, layer["ffn_norm"])
        inputs["gate_up"].add(x_norm)
        bind(projection.swiglu, x_norm @ layer["gate_up"].T, self._ffn)()
        inputs["down"].add(self._ffn)
        stream += self._ffn @ layer["down"].T

    def _attend(self, layer: Mapping[str, Array], stream: Array, inputs: Mapping[str, Inputs]) -> None:
        g = self._geometry
        x_norm = self._norm(stream, layer["attention_norm"])
        inputs["qkv"].add(x_norm)
        qkv = x_norm @ layer["qkv"].T
        if g.qkv_bias:
            qkv += layer["qkv_bias"]
        if g.qk_norm:
            eps = np.float32(g.norm_eps)
            bind(rms_norm.rms_norm_heads, qkv, layer["q_norm"], layer["k_norm"], g.q_dim, g.kv_dim, eps)()
        bind(rope.rope_and_store, qkv, self._position, *self._tables, self._q, *self._cache)()
        whole = attention.NO_WINDOW, attention.NO_CAP
        rest = self._position, g.head_dim, *whole, self._scratch, self._attn_out
        bind(attention.attend_chunk, self._q, *self._cache, *rest)()
        inputs["o"].add(self._attn_out)
        stream += self._attn_out @ layer["o"].T

    def _norm(self, stream: Array, weight: Array) -> Array:
        bind(rms_norm.rms_norm, stream, weight, np.float32(self._geometry.norm_eps), self._x_norm)()
        return self._x_norm


def final_inputs(geometry: ModelGeometry, stream: Array, norm_weight: Array) -> Inputs:
    """Statistics of the LM head's inputs: the normalized stream [sequences, T, H] after the last layer."""
    inputs, x_norm = Inputs(geometry.hidden), np.empty(stream.shape[1:], np.float32)
    for sequence in stream:
        bind(rms_norm.rms_norm, sequence, norm_weight, np.float32(geometry.norm_eps), x_norm)()
        inputs.add(x_norm)
    inputs.finish()
    return inputs
