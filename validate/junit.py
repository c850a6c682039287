"""JUnit XML of a validation, as CI services show it: a test case for each probe, stage, or replayed part."""

from collections.abc import Iterator
from typing import NamedTuple
from xml.etree import ElementTree as ET

from numba_atomflow.files.untrusted import characters_of_xml
from numba_atomflow.validate.replay import ReplayReport
from numba_atomflow.validate.report import ProbeResult, Report


class Case(NamedTuple):
    """One test case.

    Attributes:
        name: of what was compared.
        failure: why it failed, in one line; None if it passed.
    """

    name: str
    failure: str | None


def junit_xml(report: Report | ReplayReport, suite: str) -> bytes:
    """The report as a JUnit file with one test suite; its last case is the verdict.

    Args:
        report: of a validation or a replay.
        suite: its name, such as that of the model.
    """
    cases = [*_cases(report), Case("verdict", None if report.passed else report.verdict())]
    failures = sum(case.failure is not None for case in cases)
    counts = {"tests": str(len(cases)), "failures": str(failures), "errors": "0", "skipped": "0"}
    root = ET.Element("testsuites", {"name": "numba-atomflow validate"} | counts)
    element = ET.SubElement(root, "testsuite", {"name": characters_of_xml(suite)} | counts)
    properties = ET.SubElement(element, "properties")
    for name, value in _facts(report):
        ET.SubElement(properties, "property", name=name, value=characters_of_xml(value))
    for case in cases:
        group, _, name = case.name.rpartition(".")
        entry = ET.SubElement(element, "testcase", classname=f"validate.{group or 'model'}", name=name)
        if case.failure is not None:
            ET.SubElement(entry, "failure", message=characters_of_xml(case.failure)).text = characters_of_xml(
                case.failure
            )
    ET.indent(root)
    text: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _facts(report: Report | ReplayReport) -> Iterator[tuple[str, str]]:
    yield "backend", report.backend
    if isinstance(report, Report):
        yield "reference", report.reference
    yield "prompt tokens", str(report.prompt_tokens)
    yield "decode steps", str(report.decode_steps)


def _cases(report: Report | ReplayReport) -> list[Case]:
    if isinstance(report, ReplayReport):
        return [
            Case(part.name, f"run {part.run} differs from run 1 from position {part.position} on")
            if part.different
            else Case(part.name, None)
            for part in report.parts
        ]
    return [Case(probe.name, None if probe.passed else _failure(probe)) for probe in report.probes]


def _failure(probe: ProbeResult) -> str:
    if probe.share <= 1.0:
        return f"the op's own error is {probe.added_share:.3g} times its tolerance (relative L2 {probe.added:.3g})"
    return (
        f"relative L2 {probe.worst_row_l2:.3g} at position {probe.worst_row}, tolerance {probe.tolerance:.3g} "
        f"(op {probe.op})"
    )
