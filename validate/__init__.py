"""Validation against Hugging Face: compares every layer, and reports the first divergent op.

    from numba_atomflow import Engine, validate

    with Engine.load("my-model.safetensors") as engine:
        truth = validate.make_ground_truth(engine.checkpoint, "The capital of France is", decode_steps=8)
        report = validate.check(engine.backend, truth, isolate=True)
        print(report.verdict())

`make_ground_truth` needs the extra `validate`; `record` makes a reference from any backend and does not.
"""

from numba_atomflow.validate.compare import check
from numba_atomflow.validate.gpus import GpusReport, StepBits, compare_gpus, record_steps
from numba_atomflow.validate.ground_truth import check_fits, open_ground_truth, save_ground_truth
from numba_atomflow.validate.html import html_page
from numba_atomflow.validate.hugging_face import make_ground_truth, original_logits
from numba_atomflow.validate.inject import SignFlip, inject
from numba_atomflow.validate.junit import junit_xml
from numba_atomflow.validate.precision import Precision
from numba_atomflow.validate.probes import Probe, all_probes
from numba_atomflow.validate.reference import Reference, record
from numba_atomflow.validate.replay import ReplayedPart, ReplayReport, replay
from numba_atomflow.validate.report import Fault, LogitsResult, ProbeResult, Report
from numba_atomflow.validate.widths import WidthResult, WidthsReport, check_widths

__all__ = [
    "Fault",
    "GpusReport",
    "LogitsResult",
    "Precision",
    "Probe",
    "ProbeResult",
    "Reference",
    "ReplayReport",
    "ReplayedPart",
    "Report",
    "SignFlip",
    "StepBits",
    "WidthResult",
    "WidthsReport",
    "all_probes",
    "check",
    "check_fits",
    "check_widths",
    "compare_gpus",
    "html_page",
    "inject",
    "junit_xml",
    "make_ground_truth",
    "open_ground_truth",
    "original_logits",
    "record",
    "record_steps",
    "replay",
    "save_ground_truth",
]
