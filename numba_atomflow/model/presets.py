"""Geometries of well-known models, to measure their speed with random weights.

Sources: the ``config.json`` of meta-llama/Llama-3.2-1B, Llama-3.2-3B, Llama-3.1-8B, Llama-3.3-70B-Instruct and
HuggingFaceTB/SmolLM2-135M.
"""

from numba_atomflow.errors import OptionError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.rope_scaling import Llama3Scaling

PRESETS = {
    "llama-3.2-1b": ModelGeometry(
        layers=16,
        hidden=2048,
        heads=32,
        kv_heads=8,
        head_dim=64,
        ffn=8192,
        vocabulary=128256,
        max_positions=131072,
        rope_theta=500000.0,
        rope_scaling=Llama3Scaling(32.0, 1.0, 4.0, 8192),
        tied_embeddings=True,
    ),
    "llama-3.2-3b": ModelGeometry(
        layers=28,
        hidden=3072,
        heads=24,
        kv_heads=8,
        head_dim=128,
        ffn=8192,
        vocabulary=128256,
        max_positions=131072,
        rope_theta=500000.0,
        rope_scaling=Llama3Scaling(32.0, 1.0, 4.0, 8192),
        tied_embeddings=True,
    ),
    "llama-3.1-8b": ModelGeometry(
        layers=32,
        hidden=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn=14336,
        vocabulary=128256,
        max_positions=131072,
        rope_theta=500000.0,
        rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192),
    ),
    "llama-3.3-70b": ModelGeometry(
        layers=80,
        hidden=8192,
        heads=64,
        kv_heads=8,
        head_dim=128,
        ffn=28672,
        vocabulary=128256,
        max_positions=131072,
        rope_theta=500000.0,
        rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192),
    ),
    "smollm2-135m": ModelGeometry(
        layers=30,
        hidden=576,
        heads=9,
        kv_heads=3,
        head_dim=64,
        ffn=1536,
        vocabulary=49152,
        max_positions=8192,
        rope_theta=100000.0,
        tied_embeddings=True,
    ),
}


def find_preset(name: str) -> ModelGeometry:
    """The geometry of this name.

    Raises:
        OptionError: there is none.
    """
    if name not in PRESETS:
        raise OptionError(f"There is no geometry {quote(name)}; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]
