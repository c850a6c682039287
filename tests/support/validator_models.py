"""Small random models with a ground truth, for tests of the validation."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny_models import Weights, random_weights, tiny_geometry, write_hf_folder

from numba_atomflow.backends.cpu import CpuBackend
from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.convert import convert
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.rope_scaling import Llama3Scaling
from numba_atomflow.validate import Reference, make_ground_truth

PROMPT = [17, 3, 250, 99, 42, 8, 8, 131, 77, 204, 5, 61, 280, 19, 150, 33, 90, 222, 7, 110]
BLOCK = 12  # prompt in two chunks; the second starts at a position other than 0
DECODE_STEPS = 4


@dataclass(frozen=True)
class Subject:
    """A model under test: source, checkpoint, and ground truth."""

    folder: Path
    checkpoint: Checkpoint
    truth: Reference

    @property
    def geometry(self) -> ModelGeometry:
        return self.checkpoint.geometry

    @property
    def weights(self) -> dict[str, NDArray[Any]]:
        """The checkpoint's arrays, in a new dictionary."""
        return {name: self.checkpoint.array(name) for name in self.checkpoint.names() if name != "tokenizer.json"}

    def backend(self, weights: Mapping[str, NDArray[Any]] | None = None) -> CpuBackend:
        return CpuBackend(self.geometry, self.weights if weights is None else weights, len(self.truth.tokens))


def make_subject(
    folder: Path, geometry: ModelGeometry, weights: Weights | None = None, prompt: str | list[int] | None = None
) -> Subject:
    write_hf_folder(folder / "hf", geometry, weights=weights)
    checkpoint = Checkpoint.open(convert(folder / "hf", folder / "model.safetensors"))
    return Subject(folder / "hf", checkpoint, make_ground_truth(checkpoint, prompt or PROMPT, DECODE_STEPS))


def three_layers(**changes: Any) -> ModelGeometry:
    """Grouped-query attention, untied embeddings; no size is a multiple of 128 except that of q."""
    return tiny_geometry(**({"layers": 3, "heads": 6, "kv_heads": 2} | changes))


def loud_weights(geometry: ModelGeometry) -> Weights:
    """Attention scores in the hundreds: exp overflows in float32 unless the maximum is subtracted."""
    weights = random_weights(geometry, seed=5)
    for name, values in weights.items():
        if "q_proj" in name or "k_proj" in name:
            values *= np.float32(8)
    return weights


def like_llama_3b(**changes: Any) -> ModelGeometry:
    """A small Llama 3.2 3B: 28 layers, heads of 128, three query heads per KV head, llama3 RoPE, tied embeddings."""
    fields: dict[str, Any] = {
        "layers": 28,
        "hidden": 192,
        "heads": 3,
        "kv_heads": 1,
        "head_dim": 128,
        "ffn": 320,
        "vocabulary": 320,
        "max_positions": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": Llama3Scaling(32.0, 1.0, 4.0, 8192),
        "tied_embeddings": True,
    }
    return ModelGeometry(**(fields | changes))
