"""Calibrated checkpoints: quantizes all layers, then writes the checkpoint file."""

import hashlib
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.checkpoint.format import DTYPES, fusion, tensor_layout
from numba_atomflow.checkpoint.writer import CheckpointWriter
from numba_atomflow.geometry import GROUP, ModelGeometry
from numba_atomflow.model.formats import HeadFormat, head_part
from numba_atomflow.ops.fp8 import encode_groups
from numba_atomflow.ops.jit import source_hash
from numba_atomflow.ops.scale_search import search_scales
from numba_atomflow.quantize import MethodName, awq, gptq, rtn
from numba_atomflow.quantize.calibrated import quantize_layers, read_slabs
from numba_atomflow.quantize.calibration import read_calibration
from numba_atomflow.quantize.forward import final_inputs
from numba_atomflow.quantize.projection import Method
from numba_atomflow.quantize.resume import Layout, ResumableJob
from numba_atomflow.quantize.threads import cores_for_kernels
from numba_atomflow.sources import WeightSource
from numba_atomflow.utils.progress import Progress

METHODS: dict[str, Method] = {"awq": awq.quantize, "gptq": gptq.quantize}

Array = NDArray[np.float32]


def convert_calibrated(
    source: WeightSource,
    destination: Path,
    method: MethodName,
    calibration: Path | None,
    head: HeadFormat,
    origin: Mapping[str, Any],
    report: Progress,
    *,
    overwrite: bool,
) -> None:
    """The conversion of `numba_atomflow.convert.convert` by "awq" and "gptq", after source and destination are checked.

    `origin` is the record of the source; its hashes identify the job that is resumed.
    """
    g = source.geometry
    text = read_calibration(calibration, source.text, g)
    description = {"made_by": _versions(), "method": method, "source": origin, "text": text.record()}
    with ResumableJob(destination, description) as job:
        stream = quantize_layers(source, text, METHODS[method], job, report)
        record = text.record() | {"errors": _errors(job, g)}
        quantiser = {"method": method, "group_size": GROUP}
        writer = CheckpointWriter(
            destination, g, source.text, quantiser, origin, head=head, calibration=record, overwrite=overwrite
        )
        with writer:
            report("embedding", writer.written_bytes, writer.total_bytes)
            _write_outer(source, stream, head, writer)
            for i in range(g.layers):
                report(f"layer {i}", writer.written_bytes, writer.total_bytes)
                for name, tensor in job.layer(i, _layer_layout(g, i)).tensors.items():
                    writer.write(f"layer.{i}.{name}", tensor)
            report("verifying", writer.written_bytes, writer.total_bytes)
        job.remove()


def _versions() -> dict[str, str]:
    """Versions of all code that determines the bits of a layer: a job is not resumed with other code."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(path.read_bytes())
    libraries = {name: metadata.version(name) for name in ("numpy", "scipy", "numba")}
    return libraries | {"kernels": source_hash(), "quantiser": code.hexdigest(), "machine": platform.machine()}


def _layer_layout(geometry: ModelGeometry, layer: int) -> Layout:
    """The tensors of a finished layer."""
    prefix = f"layer.{layer}."
    layout = tensor_layout(geometry)
    return {
        name.removeprefix(prefix): (DTYPES[dtype], shape)
        for name, (dtype, shape) in layout.items()
        if name.startswith(prefix)
    }


def _errors(job: ResumableJob, geometry: ModelGeometry) -> dict[str, dict[str, float]]:
    """Relative output errors on the calibration text, by projection: of round-to-nearest, and of the result."""
    layers = (job.layer(i, _layer_layout(geometry, i)) for i in range(geometry.layers))
    errors = {f"layer.{i}.{name}": pair for i, layer in enumerate(layers) for name, pair in layer.errors.items()}
    return {name: {"rtn": _short(nearest), "kept": _short(result)} for name, (nearest, result) in errors.items()}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _write_outer(source: WeightSource, stream: Array, head: HeadFormat, writer: CheckpointWriter) -> None:
    """Embedding, final norm and LM head."""
    g = source.geometry
    outer = {part: names[0] for part, names in fusion(g).items() if not part.startswith("layer.")}
    norm = source.read(outer["final_norm"])
    writer.write("final_norm", norm)
    if head == "fp8":
        gram = final_inputs(g, stream, norm).gram
    for part, name in outer.items():
        if part == "final_norm":
            continue
        for _, rows in read_slabs(source, name):
            if part != head_part(g):
                tensors = _fp8(*rtn.quantize(rows))
            elif head == "fp16":
                tensors = iter([(".weight", rows.astype(np.float16))])
            else:
                with cores_for_kernels():
                    scales = search_scales(rows, gram)
                tensors = _fp8(encode_groups(rows, scales), scales)
            for suffix, values in tensors:
                writer.write(part + suffix, values)


def _fp8(codes: NDArray[np.uint8], scales: Array) -> Iterator[tuple[str, NDArray[Any]]]:
    yield ".weight", codes
    yield ".scale", scales
