"""A transformers model with forward hooks that record the probes of a validation."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.folding import final_norm_factor, query_factor, reordered_heads
from numba_atomflow.validate.probes import Rows, all_probes


class HookedModel:
    """Runs a model of transformers and stores its probes, as this project computes them (`model.folding`).

    Attributes:
        tensors: float32 [positions, width] by probe name; NaN for positions that were not run.
    """

    def __init__(self, model: Any, geometry: ModelGeometry, positions: int) -> None:
        self.tensors: dict[str, Rows] = {
            probe.name: np.full((positions, probe.width), np.nan, np.float32) for probe in all_probes(geometry)
        }
        self._model, self._geometry = model, geometry
        self._position = 0
        self._cache: Any = None
        self._angles: dict[str, Any] = {}  # cosines and sines of the current tokens, by kind of layer
        self._projected: Any = None  # q of the current layer before RoPE; by heads after a q norm
        self._local = geometry.local_rope_theta is not None
        self._hook(model)

    def feed(self, tokens: Sequence[int]) -> None:
        """Run the model on tokens that follow those of earlier calls."""
        import torch

        with torch.no_grad():
            result = self._model(torch.tensor([tokens]), past_key_values=self._cache, use_cache=True)
        self._cache = result.past_key_values
        self._position += len(tokens)

    def _hook(self, model: Any) -> None:
        def on_output(module: Any, use: Callable[[Any], None]) -> None:
            module.register_forward_hook(lambda _module, _inputs, result: use(result))

        def on_input(module: Any, use: Callable[[Any], None]) -> None:
            module.register_forward_pre_hook(lambda _module, inputs: use(inputs[0]))

        inner, g = model.model, self._geometry
        # Granite scales the embedding and the logits outside of modules.
        on_output(inner.embed_tokens, self._record("embedding", self._factor_of_embedding(inner)))
        self._hook_angles(inner.rotary_emb)
        for i, layer in enumerate(inner.layers):
            prefix = f"layer.{i}."
            self._hook_attention(layer.self_attn, prefix, i, on_output)
            on_input(layer.self_attn.o_proj, self._record(prefix + "attention"))
            norms = {ours: getattr(layer, theirs) for ours, theirs in g.norm_names().items()}
            if g.pre_norm:
                on_output(norms["attention_norm"], self._record(prefix + "input_norm"))
                on_output(norms["ffn_norm"], self._record(prefix + "ffn_norm"))
            on_input(norms.get("ffn_norm", layer.mlp), self._record(prefix + "after_attention"))
            on_input(layer.mlp.down_proj, self._record(prefix + "ffn"))
            if prefix + "mlp" in self.tensors:
                on_output(norms.get("post_ffn_norm", layer.mlp), self._record(prefix + "mlp", g.residual_scale))
            on_output(layer, self._record(prefix + "output"))
        on_output(inner.norm, self._record("final_norm", final_norm_factor(g)))
        on_output(model, lambda result: self._record("logits")(result.logits))

    def _factor_of_embedding(self, inner: Any) -> float:
        """The part of the embedding's scale that its module does not apply."""
        return 1.0 if hasattr(inner.embed_tokens, "scalar_embed_scale") else self._geometry.embedding_scale

    def _hook_angles(self, rotary: Any) -> None:
        def keep(_module: Any, inputs: Any, named: Any, angles: Any) -> None:
            kind = named.get("layer_type", inputs[2] if len(inputs) > 2 else "")
            self._angles[str(kind) if self._local else ""] = angles

        rotary.register_forward_hook(keep, with_kwargs=True)

    def _hook_attention(self, attention: Any, prefix: str, layer: int, on_output: Any) -> None:
        g = self._geometry
        if hasattr(attention, "qkv_proj"):
            on_output(attention.qkv_proj, partial(self._split, prefix, layer))
            return
        on_output(attention.q_norm if g.qk_norm else attention.q_proj, lambda q: setattr(self, "_projected", q))
        on_output(attention.k_norm if g.qk_norm else attention.k_proj, partial(self._rotate, prefix, layer))
        on_output(attention.v_proj, self._record(prefix + "v"))

    def _record(self, name: str, factor: float = 1.0) -> Callable[[Any], None]:
        def record(value: Any) -> None:
            rows = (value[0] if isinstance(value, tuple) else value)[0].numpy()
            self._store(name, rows if factor == 1.0 else rows * np.float32(factor))

        return record

    def _store(self, name: str, rows: Rows) -> None:
        self.tensors[name][self._position : self._position + len(rows)] = rows

    def _split(self, prefix: str, layer: int, qkv: Any) -> None:
        """Q, k and v of a fused projection."""
        g = self._geometry
        self._projected, k, v = qkv.split([g.q_dim, g.kv_dim, g.kv_dim], dim=-1)
        self._rotate(prefix, layer, k)
        self._record(prefix + "v")(v)

    def _rotate(self, prefix: str, layer: int, k: Any) -> None:
        """Q and k after RoPE, recomputed by transformers' function: they are not the output of a module."""
        from transformers.models.phi3 import modeling_phi3

        rotate: Any = modeling_phi3.apply_rotary_pos_emb  # takes partial RoPE too

        g = self._geometry

        def heads(x: Any) -> Any:
            if x.dim() == 4:  # a norm of single heads; Gemma's is after the transposition, Qwen3's before it
                return x if g.post_norm else x.transpose(1, 2)
            return x.reshape(*x.shape[:2], -1, g.head_dim).transpose(1, 2)

        q, k = heads(self._projected), heads(k)
        if layer not in g.no_rope_layers:
            kind = "sliding_attention" if layer in g.sliding_layers else "full_attention"
            q, k = rotate(q, k, *self._angles[kind if self._local else ""])
        for name, x, factor in (("q", q, query_factor(g)), ("k", k, 1.0)):
            rows = reordered_heads(g, x.transpose(1, 2).flatten(-2)[0].numpy(), axis=1)
            self._store(prefix + name, rows * np.float32(factor))
