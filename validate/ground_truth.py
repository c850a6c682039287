"""Ground-truth files: one safetensors file with every probe, and metadata that identify the model.

Tensors: one float32 [positions, width] for each name of `probes.all_probes`. Metadata, all strings: format,
format_version, reference ("dequantised" or "original"), text (of the prompt), tokens (JSON: ids of prompt and decode
steps), prompt_tokens, geometry (JSON), versions (JSON), checkpoint_sha256, source (JSON, the checkpoint's own record).
"""

import hashlib
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.checkpoint.safetensors import TensorFile, file_head, read_tensor_file
from numba_atomflow.errors import CheckpointError, DestinationError, GeometryError, GroundTruthError
from numba_atomflow.files.atomic import write_pieces
from numba_atomflow.files.untrusted import load_json, quote, short
from numba_atomflow.geometry import ModelGeometry, layers_fit
from numba_atomflow.memory.mapped_file import MappedFile
from numba_atomflow.text.codec import TextCodec
from numba_atomflow.utils.arguments import file_path
from numba_atomflow.validate.precision import E4M3, Precision
from numba_atomflow.validate.probes import Rows, all_probes
from numba_atomflow.validate.reference import Reference

FORMAT = "numba-atomflow ground truth"
FORMAT_VERSION = "1"
REFERENCES = ("dequantised", "original")  # weights: the checkpoint's FP8 dequantized, or those of the source

_ADVICE = "make it again with `numba-atomflow ground-truth`"
_METADATA_KEYS = (
    "reference",
    "text",
    "tokens",
    "prompt_tokens",
    "geometry",
    "versions",
    "checkpoint_sha256",
    "source",
)


def precision_of(reference: str) -> Precision:
    """The precision of transformers in float32; original weights differ by one rounding to FP8."""
    return Precision(float32_angles=True, weights=E4M3 if reference == "original" else 0.0)


def save_ground_truth(truth: Reference, path: Path | str) -> None:
    """Write a ground truth; the file is published atomically.

    Raises:
        DestinationError: the file cannot be written.
    """
    path = file_path("path", path)
    head = file_head({name: ("F32", rows.shape) for name, rows in truth.tensors.items()}, truth.metadata)
    contents = (np.ascontiguousarray(tensor, "<f4").data for tensor in truth.tensors.values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_pieces(path, chain([head], contents), replace=True)
    except OSError as error:
        raise DestinationError(
            f"{path} cannot be written ({error.strerror}); make room, or choose another name."
        ) from error


def open_ground_truth(path: Path | str) -> Reference:
    """Map a ground truth and validate it against its metadata; `check_fits` compares it with a model.

    Raises:
        GroundTruthError: the file is missing, damaged, incomplete, or of another format version.
    """
    path = file_path("path", path)
    file = read_tensor_file(path, GroundTruthError)
    metadata = file.metadata
    if metadata.get("format") != FORMAT:
        raise GroundTruthError(f"{path} is not a ground truth of this program; {_ADVICE}.")
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise GroundTruthError(
            f"{path} has format version {quote(version)}, this program reads version {FORMAT_VERSION}; {_ADVICE}."
        )
    for key in _METADATA_KEYS:
        if key not in metadata:
            raise GroundTruthError(f"{path} lacks the record {key}; {_ADVICE}.")
    if metadata["reference"] not in REFERENCES:
        raise GroundTruthError(f"{path} has the unknown reference {quote(metadata['reference'])}; {_ADVICE}.")
    try:
        geometry = ModelGeometry.from_dict(_object(metadata["geometry"]))
        tokens = load_json(metadata["tokens"])
        prompt_tokens = load_json(metadata["prompt_tokens"])
    except (ValueError, GeometryError) as error:
        raise GroundTruthError(f"The description in {path} cannot be read ({error}); {_ADVICE}.") from error
    valid_ids = range(geometry.vocabulary)
    if not isinstance(tokens, list) or not all(type(token) is int and token in valid_ids for token in tokens):
        raise GroundTruthError(f"The tokens in {path} are not ids of its vocabulary; {_ADVICE}.")
    if type(prompt_tokens) is not int or not 1 <= prompt_tokens <= len(tokens):
        raise GroundTruthError(f"The tokens in {path} do not fit its description; {_ADVICE}.")
    mapped = MappedFile(path, file.stamp, GroundTruthError)
    tensors = _map_tensors(file, mapped, geometry, len(tokens))
    return Reference(
        label=f"transformers, {metadata['reference']} weights",
        geometry=geometry,
        tokens=tuple(tokens),
        prompt_tokens=prompt_tokens,
        precision=precision_of(metadata["reference"]),
        tensors=tensors,
        metadata=metadata,
        check_unchanged=mapped.check_unchanged,
    )


def _object(text: str) -> dict[str, Any]:
    match load_json(text):
        case dict(record):
            return record
        case other:
            raise ValueError(f"{quote(other)} is not an object")


def _map_tensors(file: TensorFile, mapped: MappedFile, geometry: ModelGeometry, positions: int) -> dict[str, Rows]:
    if not layers_fit(geometry, len(file.entries)):
        raise GroundTruthError(
            f"{file.path} describes {geometry.layers} layers, but has {len(file.entries)} probes; {_ADVICE}."
        )
    tensors: dict[str, Rows] = {}
    for probe in all_probes(geometry):
        entry = file.entries.get(probe.name)
        if entry is None:
            raise GroundTruthError(f"{file.path} lacks the probe {probe.name}; {_ADVICE}.")
        shape = (positions, probe.width)
        if (entry.dtype, entry.shape) != ("F32", shape):
            raise GroundTruthError(
                f"Probe {probe.name} of {file.path} is {entry.dtype} {quote(list(entry.shape))}, not F32 "
                f"{list(shape)}; {_ADVICE}."
            )
        tensors[probe.name] = mapped.array(np.dtype("<f4"), shape, entry.offset)
        finite = np.isfinite(tensors[probe.name]).all()
        mapped.check_unchanged()
        if not finite:
            raise GroundTruthError(f"Probe {probe.name} of {file.path} holds a NaN or an infinity; {_ADVICE}.")
    return tensors


def check_fits(truth: Reference, path: Path, checkpoint: Checkpoint, prompt: str | None = None) -> None:
    """Check that a ground truth is of this checkpoint, and its prompt tokens are those of the tokenizer.

    Args:
        truth: from `open_ground_truth`.
        path: of its file, for messages.
        checkpoint: of the model under test.
        prompt: the expected prompt, or None.

    Raises:
        GroundTruthError: naming what differs.
    """
    if truth.geometry != checkpoint.geometry:
        field, expected, actual = _first_difference(truth.geometry.to_dict(), checkpoint.geometry.to_dict())
        raise GroundTruthError(
            f"{path} is of another model: its {field} is {quote(expected)}, that of {checkpoint.path} is "
            f"{quote(actual)}; {_ADVICE}."
        )
    expected, actual = truth.metadata["checkpoint_sha256"], checkpoint.sha256()
    if expected != actual:
        raise GroundTruthError(
            f"{path} is of another checkpoint (SHA-256 {short(expected[:12])}, {checkpoint.path} has {actual[:12]}); "
            f"{_ADVICE}."
        )
    text = truth.metadata["text"]
    if prompt is not None and prompt != text:
        raise GroundTruthError(f"{path} was made for another prompt, {quote(text)}; leave --prompt out, or {_ADVICE}.")
    if text and checkpoint.text.tokenizer_json is not None:
        ids = TextCodec(checkpoint.text).encode(text)
        stored = list(truth.tokens[: truth.prompt_tokens])
        if ids != stored:
            raise GroundTruthError(
                f"{path} holds {len(stored)} prompt tokens that are not the {len(ids)} to which the tokenizer of "
                f"{checkpoint.path} encodes its text; {_ADVICE}."
            )


def _first_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[str, Any, Any]:
    return next((key, a[key], b[key]) for key in a if a[key] != b[key])


def sha256(path: Path) -> str:
    """SHA-256 of a source's file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
