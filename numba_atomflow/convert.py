"""Conversion of a source model to an FP8 checkpoint: round-to-nearest in slabs of rows, or calibrated by layers."""

import hashlib
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import numpy as np

from numba_atomflow import home
from numba_atomflow.checkpoint.format import fusion
from numba_atomflow.checkpoint.writer import CheckpointWriter
from numba_atomflow.errors import DestinationError, OptionError, SourceError, SourceWarning, TextError
from numba_atomflow.files.destination import check_destination
from numba_atomflow.files.stamp import stamps_of, unchanged
from numba_atomflow.files.text_input import read_text_file
from numba_atomflow.files.untrusted import quote
from numba_atomflow.model.features import beyond_calibration
from numba_atomflow.model.formats import HeadFormat, head_part
from numba_atomflow.quantize import MethodName, rtn
from numba_atomflow.quantize.calibration import SEQUENCE_TOKENS
from numba_atomflow.quantize.checkpoint import convert_calibrated
from numba_atomflow.sources import WeightSource, local_source, open_source
from numba_atomflow.sources.base import TEXT_RULES, slabs
from numba_atomflow.sources.gguf_parts import part_names
from numba_atomflow.text.chat_template import ChatTemplate
from numba_atomflow.text.codec import TextAssets, TextCodec
from numba_atomflow.utils.arguments import file_path, one_of, truth_value
from numba_atomflow.utils.progress import Progress


def convert(
    source: Path | str,
    destination: Path | str,
    *,
    revision: str | None = None,
    method: MethodName = "rtn",
    calibration: Path | str | None = None,
    head: HeadFormat = "fp8",
    overwrite: bool = False,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
) -> Path:
    """Quantize the model at `source` to FP8 and write it to `destination`.

    "rtn" takes constant memory: weights are converted in slabs of rows; FP8 weights keep their codes and scales. The
    other methods hold one layer in memory. If they are interrupted, the finished layers stay in
    ``<destination>.unfinished``, and the next call resumes from them. The destination is published atomically.

    Args:
        source: a GGUF file, a Hugging Face folder, or a model of the hub (``org/name`` or ``org/name/file.gguf``).
        destination: the checkpoint file; missing folders are created.
        revision: of a model of the hub: branch, tag or commit; "main" by default.
        method: "rtn" (round to nearest), "awq" (channel scales and clipping) or "gptq" (clipping and error feedback).
        calibration: a text file, for "awq" and "gptq"; by default Python's docstrings.
        head: format of the LM head (and of the embedding, if they are tied); an LM head that is FP8 in the source
            stays FP8.
        overwrite: replace an existing checkpoint.
        progress: called before each step with its name, bytes done and total bytes: download, hashing, calibration of
            layers (one byte per weight), writing.
        warn: called with a sentence for each setting of the source that is ignored; by default a Python warning of
            class `SourceWarning`.

    Returns:
        `destination`.

    Raises:
        SourceError, GeometryError: the source cannot be used.
        HubError: it cannot be downloaded.
        TextError: the calibration text cannot be read, or there is no tokenizer for it.
        OptionError: the calibration text is too short, or given with "rtn"; "awq" or "gptq" for weights that are FP8
            in the source, or for a family whose layers calibration cannot run.
        DestinationError: the destination exists, or cannot be written.
    """
    destination = home.expand_user(file_path("destination", destination))
    calibration = None if calibration is None else home.expand_user(file_path("calibration", calibration))
    source = file_path("source", source)
    if not one_of(method, get_args(MethodName)):
        raise OptionError(f"There is no method {quote(method)}; choose {', '.join(get_args(MethodName))}.")
    if not one_of(head, get_args(HeadFormat)):
        raise OptionError(f"head is {quote(head)}; choose {' or '.join(get_args(HeadFormat))}.")
    if method == "rtn" and calibration is not None:
        raise OptionError(
            "The method rtn uses no calibration text; choose another method, or leave the calibration out."
        )
    overwrite = truth_value("overwrite", overwrite)
    check_destination(destination, overwrite)
    if calibration is not None:
        read_text_file(calibration)  # before a download that would be in vain
    source = local_source(source, revision, progress)
    initial = stamps_of(_source_files(source))
    weights = open_source(source)
    for warning in (*weights.warnings, *_check_text(source, weights.text, weights.geometry.vocabulary)):
        if warn is None:
            warnings.warn(warning, SourceWarning, stacklevel=2)
        else:
            warn(warning)
    if destination.exists() and any(destination.samefile(file) for file in weights.files):
        raise DestinationError(f"{destination} is part of the source; choose another name.")
    if method != "rtn" and weights.fp8_scheme:
        raise OptionError(f"{source} is FP8 already; use the method rtn, which keeps its codes and scales.")
    missing = beyond_calibration(weights.geometry, SEQUENCE_TOKENS) if method != "rtn" else []
    if missing:
        raise OptionError(f"Calibration cannot run {missing[0]}, which the model at {source} has; use the method rtn.")
    with unchanged({path: initial.get(path) for path in weights.files}, SourceError) as check:

        def report(what: str, done: int, total: int) -> None:
            check()  # the last report comes after the last read and before publication
            if progress is not None:
                progress(what, done, total)

        _write(weights, destination, method, calibration, head, report, overwrite=overwrite)
    return destination


def _write(
    weights: WeightSource,
    destination: Path,
    method: MethodName,
    calibration: Path | None,
    head: HeadFormat,
    report: Progress,
    *,
    overwrite: bool,
) -> None:
    """The conversion, after source and destination have been checked."""
    origin = _describe(weights, report)
    if method != "rtn":
        convert_calibrated(weights, destination, method, calibration, head, origin, report, overwrite=overwrite)
        return
    if head == "fp16" and _is_fp8(weights, head_part(weights.geometry)):
        head = "fp8"  # float16 would round code * scale, and take twice the space
    quantiser = {"kept": weights.fp8_scheme} | rtn.RECORD if weights.fp8_scheme else rtn.RECORD
    writer = CheckpointWriter(
        destination, weights.geometry, weights.text, quantiser, origin, head=head, overwrite=overwrite
    )
    fp16_part = head_part(weights.geometry) if head == "fp16" else None
    with writer:
        for part, names in fusion(weights.geometry).items():
            report(part, writer.written_bytes, writer.total_bytes)
            for name in names:
                _convert_tensor(weights, name, writer, part, fp16=part == fp16_part)
        report("verifying", writer.written_bytes, writer.total_bytes)


def _source_files(source: Path) -> list[Path]:
    """All files of a source."""
    with suppress(OSError):  # open_source reports it
        if source.is_dir():
            return list(source.iterdir())
        return [source.parent / name for name in part_names(source.name)]
    return []


def _is_fp8(weights: WeightSource, part: str) -> bool:
    """Whether a part of the model is FP8 in the source."""
    (name,) = fusion(weights.geometry)[part]
    return weights.read_fp8(name, 0, 1) is not None


def _check_text(source: Path, text: TextAssets, vocabulary: int) -> list[str]:
    """Check tokenizer and chat template now; otherwise they would fail at the first use of the checkpoint.

    Returns:
        Sentences for the user, about what may fail later.

    Raises:
        SourceError: the tokenizer cannot be loaded, fails, or is of another model; the chat template is not valid
            Jinja or exceeds its limits.
    """
    try:
        if text.tokenizer_json is not None:
            unknown = [token for token in TextCodec(text).encode("A try.") if token >= vocabulary]
            if unknown:
                raise SourceError(
                    f"{source} cannot be converted: its tokenizer uses the token {unknown[0]} for plain text, but the "
                    f"model has {vocabulary}; get the tokenizer that belongs to the model."
                )
        if text.chat_template is not None:
            refusal = ChatTemplate(text.chat_template, text.special_tokens()).try_question()
            if refusal is not None:
                return [f"{source} has a chat template with which `chat` may fail, as one question does: {refusal}"]
    except TextError as error:
        raise SourceError(f"{source} cannot be converted: {error}") from error
    return []


def _convert_tensor(weights: WeightSource, name: str, writer: CheckpointWriter, part: str, *, fp16: bool) -> None:
    shape = weights.shape(name)
    if len(shape) == 1:
        writer.write(part, weights.read(name))
        return
    rows, columns = shape
    for start, stop in slabs(rows, columns):
        if fp16:
            writer.write(part + ".weight", weights.read(name, start, stop).astype(np.float16))
            continue
        codes, scales = weights.read_fp8(name, start, stop) or rtn.quantize(weights.read(name, start, stop))
        writer.write(part + ".weight", codes)
        writer.write(part + ".scale", scales)


def _describe(weights: WeightSource, report: Progress) -> dict[str, Any]:
    """The record of the source: name, kind, SHA-256 of its files, version of the text rules."""
    digests: dict[str, str] = {}
    done = 0
    for path in weights.files:
        try:
            total = sum(file.stat().st_size for file in weights.files)
            report(f"hashing {path.name}", done, total)
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
                done += file.tell()
        except OSError as error:
            raise SourceError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    name = weights.path.resolve().name
    return {"path": name, "kind": weights.kind, "sha256": digests, "text_rules": TEXT_RULES}
