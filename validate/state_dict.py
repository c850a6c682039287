"""The weights of a checkpoint as a state dict of transformers: dequantized, without what was folded into them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.checkpoint.format import Checkpoint, fusion
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.config_json import model_type_of
from numba_atomflow.model.folding import original
from numba_atomflow.sources.huggingface_families import FAMILIES
from numba_atomflow.sources.huggingface_names import FUSED

State = dict[str, NDArray[np.float32]]


def state_dict(checkpoint: Checkpoint) -> State:
    """Every tensor as float32, a copy, under transformers' name."""
    shapes = checkpoint.geometry.parameters()
    state: State = {}
    for part, names in fusion(checkpoint.geometry).items():
        vector = len(shapes[names[0]]) == 1
        weights = checkpoint.array(part).copy() if vector else checkpoint.matrix(part)
        ends = np.cumsum([shapes[name][0] for name in names])
        state |= dict(zip(names, np.split(weights, ends[:-1]), strict=True))
    checkpoint.check_unchanged()
    return as_in_transformers(checkpoint.geometry, state)


def as_in_transformers(geometry: ModelGeometry, state: State) -> State:
    """Tensors of `ModelGeometry.parameters`, as a source reads them, to those of transformers' model."""
    model_type = model_type_of(geometry)
    offset = np.float32(FAMILIES[model_type].norm_offset)
    found = {name: original(geometry, name, values) for name, values in state.items()}
    found = {name: values - offset if name.endswith("norm.weight") else values for name, values in found.items()}
    if geometry.tied_embeddings:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return _fused(found) if model_type == "phi3" else found


def compute_constants(model: Any, config: Any) -> None:
    """The buffers of a model that was made on the meta device, in no state dict: of RoPE, and of Gemma."""
    import torch

    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    embedding = model.model.embed_tokens
    if hasattr(embedding, "scalar_embed_scale"):
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale)


def _fused(state: State) -> State:
    """The projections that are one tensor in Phi-3."""
    fused = dict(state)
    for whole, parts in FUSED.items():
        for name in state:
            stem, _, part = name.removesuffix(".weight").rpartition(".")
            if part == parts[0]:
                fused[f"{stem}.{whole}.weight"] = np.concatenate([fused.pop(f"{stem}.{x}.weight") for x in parts])
    return fused
