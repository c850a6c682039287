"""Tensors of Hugging Face folders under the names of `ModelGeometry.parameters`: of image models, and fused ones."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from numba_atomflow.checkpoint.safetensors import TensorEntry
from numba_atomflow.errors import SourceError
from numba_atomflow.files.untrusted import short
from numba_atomflow.geometry import ModelGeometry

Entries = dict[str, tuple[Path, TensorEntry]]

_OF_IMAGES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_OF_TEXT = (("language_model.", ""), ("model.language_model.", "model."))
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def language_model(entries: Entries) -> Entries:
    """The tensors of the language model in a model that reads images too."""
    found: Entries = {}
    for name, location in entries.items():
        if name.startswith(_OF_IMAGES):
            continue
        prefix, instead = next(((old, new) for old, new in _OF_TEXT if name.startswith(old)), ("", ""))
        found[instead + name.removeprefix(prefix)] = location
    return found


def split_fused(geometry: ModelGeometry, entries: Entries, scaled: Iterable[str]) -> Entries:
    """Fused projections (Phi-3) as the rows of each part.

    Args:
        geometry: of the model.
        entries: tensors by name.
        scaled: names of FP8 weights, whose scales are stored apart.

    Raises:
        SourceError: a fused projection is FP8, or has another number of rows than its parts.
    """
    g = geometry
    rows_of = {"q_proj": g.q_dim, "k_proj": g.kv_dim, "v_proj": g.kv_dim, "gate_proj": g.ffn, "up_proj": g.ffn}
    found: Entries = {}
    for name, (path, entry) in entries.items():
        stem, _, fused = name.removesuffix(".weight").rpartition(".")
        parts = FUSED.get(fused, ())
        if not parts:
            found[name] = path, entry
            continue
        rows = [rows_of[part] for part in parts]
        if name in set(scaled):
            raise SourceError(f"Tensor {short(name)} of {path} is FP8 and fused, which is not supported.")
        if len(entry.shape) != 2 or entry.shape[0] != sum(rows):
            raise SourceError(
                f"Tensor {short(name)} of {path} has shape {list(entry.shape)}, but the model's description says "
                f"{sum(rows)} rows."
            )
        row_bytes = entry.nbytes // entry.shape[0]
        offset = entry.offset
        for part, count in zip(parts, rows, strict=True):
            found[f"{stem}.{part}.weight"] = path, _rows_of(entry, offset, count, row_bytes)
            offset += count * row_bytes
    return found


def _rows_of(entry: TensorEntry, offset: int, rows: int, row_bytes: int) -> TensorEntry:
    """The entry of a range of a matrix's rows."""
    return replace(entry, offset=offset, shape=(rows, entry.shape[1]), nbytes=rows * row_bytes)
