"""The same model in transformers: float32 weights, dequantised from an FP8 checkpoint."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from closeness import relative_l2
from numpy.typing import NDArray

from numba_atomflow.checkpoint.format import Checkpoint

transformers = pytest.importorskip("transformers", reason="transformers is the reference: pip install '.[validate]'")
torch = pytest.importorskip("torch", reason="torch is the reference: pip install '.[validate]'")

LIMIT = 1e-4  # relative L2 of logits


def check_logits(got: np.ndarray, expected: np.ndarray, what: str) -> None:
    """At every position: relative L2 within the limit, and the same most likely token."""
    errors = [relative_l2(a, b) for a, b in zip(got, expected, strict=True)]
    worst = int(np.argmax(errors))
    share = f"relative L2 {errors[worst]:.3g} is {errors[worst] / LIMIT:.1%} of {LIMIT} at position {worst}"
    assert np.isfinite(errors).all(), what
    assert errors[worst] <= LIMIT, f"{what}: {share}"
    wrong = np.flatnonzero(got.argmax(axis=1) != expected.argmax(axis=1))
    assert not wrong.size, f"{what}: another token is most likely at positions {wrong.tolist()} ({share})"


def dequantised(checkpoint: Checkpoint) -> dict[str, NDArray[np.float32]]:
    """Every tensor of the checkpoint as float32, under its Hugging Face name."""
    g = checkpoint.geometry

    matrix = checkpoint.matrix
    weights = {"model.embed_tokens.weight": matrix("embedding"), "model.norm.weight": checkpoint.array("final_norm")}
    for i in range(g.layers):
        ours, theirs = f"layer.{i}.", f"model.layers.{i}."
        q, k, v = np.split(matrix(ours + "qkv"), [g.q_dim, g.q_dim + g.kv_dim])
        gate, up = np.split(matrix(ours + "gate_up"), 2)
        weights |= {
            theirs + "self_attn.q_proj.weight": q,
            theirs + "self_attn.k_proj.weight": k,
            theirs + "self_attn.v_proj.weight": v,
            theirs + "self_attn.o_proj.weight": matrix(ours + "o"),
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": matrix(ours + "down"),
            theirs + "input_layernorm.weight": checkpoint.array(ours + "attention_norm"),
            theirs + "post_attention_layernorm.weight": checkpoint.array(ours + "ffn_norm"),
        }
        if g.qkv_bias:
            biases = np.split(checkpoint.array(ours + "qkv_bias"), [g.q_dim, g.q_dim + g.kv_dim])
            weights |= {f"{theirs}self_attn.{x}_proj.bias": bias for x, bias in zip("qkv", biases, strict=True)}
        if g.qk_norm:
            weights |= {f"{theirs}self_attn.{x}_norm.weight": checkpoint.array(f"{ours}{x}_norm") for x in "qk"}
    head = "model.embed_tokens.weight" if g.tied_embeddings else None
    weights["lm_head.weight"] = weights[head] if head else matrix("vocabulary")
    return weights


class Reference:
    """The class that transformers has for a source, with a checkpoint's weights.

    Args:
        source: the model folder or GGUF file that was converted: transformers reads its configuration itself.
        checkpoint: what became of it.
    """

    def __init__(self, source: Path, checkpoint: Checkpoint) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' own, about its dependencies
            place = (str(source),) if source.is_dir() else (str(source.parent),)
            options = {} if source.is_dir() else {"gguf_file": source.name}
            self.config: Any = transformers.AutoConfig.from_pretrained(*place, **options)
            with torch.device("meta"):
                self.model: Any = transformers.AutoModelForCausalLM.from_config(
                    self.config, dtype=torch.float32, attn_implementation="eager"
                )
            # Rotary frequencies are made when the module is, and are not among the weights.
            self.model.model.rotary_emb = type(self.model.model.rotary_emb)(self.config)
            weights = {name: torch.from_numpy(np.array(array)) for name, array in dequantised(checkpoint).items()}
            self.model.load_state_dict(weights, strict=True, assign=True)
        self.model.eval()

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(token_ids), V] of every position."""
        with torch.no_grad():
            logits: NDArray[np.float32] = self.model(torch.tensor([list(token_ids)])).logits[0].numpy()
        return logits

    def greedy(self, token_ids: Sequence[int], count: int) -> list[int]:
        """`count` most likely tokens in a row, whatever ends a reply."""
        past, new, out = None, list(token_ids), []
        with torch.no_grad():
            for _ in range(count):
                step = self.model(torch.tensor([new]), past_key_values=past, use_cache=True)
                past, new = step.past_key_values, [int(step.logits[0, -1].argmax())]
                out += new
        return out
