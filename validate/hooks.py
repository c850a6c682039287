"""A transformers model with forward hooks that record the probes of a validation."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.validate.probes import Rows, all_probes


class HookedModel:
    """Runs a Llama, Qwen2 or Qwen3 of transformers and stores its probes.

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
        self._angles: Any = None  # cosines and sines of the current tokens
        self._projected: Any = None  # q of the current layer before RoPE; by heads after a q norm
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

        inner = model.model
        on_output(inner.embed_tokens, self._record("embedding"))
        on_output(inner.rotary_emb, lambda angles: setattr(self, "_angles", angles))
        for i, layer in enumerate(inner.layers):
            attention, mlp = layer.self_attn, layer.mlp
            prefix = f"layer.{i}."
            on_output(layer.input_layernorm, self._record(prefix + "input_norm"))
            has_norms = self._geometry.qk_norm
            on_output(attention.q_norm if has_norms else attention.q_proj, lambda q: setattr(self, "_projected", q))
            on_output(attention.k_norm if has_norms else attention.k_proj, partial(self._rotate, prefix))
            on_output(attention.v_proj, self._record(prefix + "v"))
            on_input(attention.o_proj, self._record(prefix + "attention"))
            on_input(layer.post_attention_layernorm, self._record(prefix + "after_attention"))
            on_output(layer.post_attention_layernorm, self._record(prefix + "ffn_norm"))
            on_input(mlp.down_proj, self._record(prefix + "ffn"))
            if prefix + "mlp" in self.tensors:
                on_output(mlp, self._record(prefix + "mlp"))
            on_output(layer, self._record(prefix + "output"))
        on_output(inner.norm, self._record("final_norm"))
        on_output(model.lm_head, self._record("logits"))

    def _record(self, name: str) -> Callable[[Any], None]:
        def record(value: Any) -> None:
            rows = (value[0] if isinstance(value, tuple) else value)[0].numpy()
            self.tensors[name][self._position : self._position + len(rows)] = rows

        return record

    def _rotate(self, prefix: str, k: Any) -> None:
        """Q and k after RoPE, recomputed by transformers' function: they are not the output of a module."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        def heads(x: Any) -> Any:
            return x.reshape(*x.shape[:2], -1, self._geometry.head_dim).transpose(1, 2)

        rotated = apply_rotary_pos_emb(heads(self._projected), heads(k), *self._angles)
        for name, x in zip("qk", rotated, strict=True):
            self._record(prefix + name)(x.transpose(1, 2).flatten(-2))
