"""Nsight Compute's counters of every kernel of a decode step, in one table.

    python scripts/ncu_profile.py                                        # the demo model
    python scripts/ncu_profile.py --geometry llama-3.2-3b --out step
    python scripts/ncu_profile.py --read step.ncu-rep                    # the table of an earlier report

One decode step runs op by op; ncu replays each kernel once per group of counters. The table compares DRAM bytes read
with the compulsory traffic of the op (weights and KV cache), which reveals redundant reads. Times are those under ncu,
with caches flushed before every replay. Needs Nsight Compute, the right to read counters
(https://developer.nvidia.com/ERR_NVGPUCTRPERM) and the extra `profile` (nvtx).
"""

import argparse
import csv
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import nsight

from numba_atomflow.utils.json_text import json_text
from numba_atomflow.utils.tables import render

TIME = "gpu__time_duration.sum"
DRAM_READ, DRAM_WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
DRAM = "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"
SM = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
REGISTERS = "launch__registers_per_thread"
METRICS = (TIME, DRAM_READ, DRAM_WRITTEN, DRAM, SM, OCCUPANCY, REGISTERS)
SECTIONS = ("WarpStateStats", "LaunchStats")  # the first has the stalls
STALL = re.compile(r"smsp__average_warps_issue_stalled_(?P<reason>\w+)_per_issue_active\.ratio")
TOP_STALLS = 3

_SCALES = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNIT = re.compile(r"(?P<scale>[numKMGT]?)(?P<unit>byte|second|s)")


@dataclass(frozen=True)
class KernelRun:
    """One kernel, as measured by ncu.

    Attributes:
        label: the innermost NVTX range around its launch (an op's name), or the kernel's name if there is none.
        kernel: the kernel's own name.
        seconds: of one run. dram_read, dram_written: bytes. None: no such counter on this GPU.
        dram, sm, occupancy: percent of the GPU's peak.
        stalls: warps stalled per instruction issued, by reason, largest first.
    """

    label: str
    kernel: str
    seconds: float | None
    dram_read: float | None
    dram_written: float | None
    dram: float | None
    sm: float | None
    occupancy: float | None
    registers: int | None
    stalls: dict[str, float]


@dataclass(frozen=True)
class KindRow:
    """All kernels of one kind of op; means of `KernelRun`.

    Attributes:
        must_read: bytes of weights and KV cache per op; None if the kernel belongs to no op.
    """

    kind: str
    kernels: list[str]
    count: int
    seconds: float | None
    dram_read: float | None
    must_read: float | None
    dram: float | None
    sm: float | None
    occupancy: float | None
    registers: float | None
    stalls: dict[str, float]


# --- commands --------------------------------------------------------------------------------------------------------


def profile_command(ncu: str, out: Path, child: Sequence[str]) -> list[str]:
    """The command that profiles the range `nsight.CAPTURED` of a Python program."""
    return [
        ncu,
        f"--export={out}",
        "--force-overwrite",
        "--target-processes=all",
        "--nvtx",
        f"--nvtx-include={nsight.CAPTURED}",
        "--clock-control=none",  # by default ncu lowers the clocks
        "--metrics=" + ",".join(METRICS),
        *(f"--section={section}" for section in SECTIONS),
        sys.executable,
        *child,
    ]


def read_command(ncu: str, report: Path, *, renamed: bool) -> list[str]:
    """Print a report as CSV: a row per kernel, a column per metric.

    Args:
        ncu: the tool.
        report: that it wrote.
        renamed: kernels are called like the NVTX range around their launch.
    """
    name = ["--print-nvtx-rename=kernel"] if renamed else []
    return [ncu, f"--import={report}", "--csv", "--page=raw", "--print-units=base", *name]


# --- what they print -------------------------------------------------------------------------------------------------


def parse_raw(text: str) -> list[dict[str, str | float]]:
    """The raw page: a record per kernel, values of metrics as numbers in bytes, seconds and percent.

    The first row names the columns, the second their units; lines before it are messages of ncu.

    Raises:
        ToolError: there is no kernel in it.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    rows = [] if start is None else list(csv.reader(lines[start:]))
    if len(rows) < 3:
        said = next((line.strip("= .") for line in lines if "ERR" in line or "No kernels" in line), "ncu says no more")
        raise nsight.ToolError(f"The report holds no GPU kernels ({said}); was the CUDA backend used?")
    names, units, *values = rows
    return [
        {name: _number(value, unit) for name, unit, value in zip(names, units, row, strict=True)}
        for row in values
        if len(row) == len(names)
    ]


def _number(value: str, unit: str) -> str | float:
    """A cell as a number in base units, or as it is."""
    if not re.fullmatch(r"-?[\d,]+(\.\d+)?([eE][+-]?\d+)?", value):
        return value
    number = float(value.replace(",", ""))
    scaled = _UNIT.match(unit)
    return number * _SCALES[scaled["scale"]] if scaled else number


def kernel_runs(
    plain: Sequence[Mapping[str, str | float]], renamed: Sequence[Mapping[str, str | float]]
) -> list[KernelRun]:
    """The kernels of a report, from its raw page with their own names and with those of their ranges."""
    # ncu 2025.3 writes "layer.0.qkv/qkv_x1" where others write the range alone.
    labels = {row["ID"]: str(row["Kernel Name"]).partition("/")[0] for row in renamed}

    def metric(row: Mapping[str, str | float], name: str) -> float | None:
        value = row.get(name)
        return value if isinstance(value, float) else None

    runs = []
    for row in plain:
        registers = metric(row, REGISTERS)
        runs.append(
            KernelRun(
                label=labels.get(row["ID"], str(row["Kernel Name"])),
                kernel=str(row["Kernel Name"]),
                seconds=metric(row, TIME),
                dram_read=metric(row, DRAM_READ),
                dram_written=metric(row, DRAM_WRITTEN),
                dram=metric(row, DRAM),
                sm=metric(row, SM),
                occupancy=metric(row, OCCUPANCY),
                registers=None if registers is None else int(registers),
                stalls=_stalls(row),
            )
        )
    return runs


def _stalls(row: Mapping[str, str | float]) -> dict[str, float]:
    """Reasons why warps wait. "selected" is a warp that does not, and "not_issued" counts again in another way."""
    found = {}
    for name, value in row.items():
        match = STALL.fullmatch(name)
        if match and isinstance(value, float) and match["reason"] != "selected" and "not_issued" not in match["reason"]:
            found[match["reason"]] = value
    return dict(sorted(found.items(), key=lambda item: item[1], reverse=True))


# --- the table -------------------------------------------------------------------------------------------------------


def by_kind(runs: Sequence[KernelRun], must_read: Mapping[str, float]) -> list[KindRow]:
    """Kernels put together by the kind of their op: ``layer.3.qkv`` is a qkv. Longest first.

    Args:
        runs: of one token.
        must_read: bytes that each op must read, by its name.
    """
    kinds: dict[str, list[KernelRun]] = {}
    for run in runs:
        kind = run.label.rpartition(".")[2] if run.label in must_read else run.label
        kinds.setdefault(kind, []).append(run)
    rows = []
    for kind, members in kinds.items():
        ops = {run.label for run in members}  # an op may be several kernels
        all_ops = ops <= must_read.keys()
        reasons = {reason for run in members for reason in run.stalls}
        stalls = {reason: statistics.fmean(run.stalls.get(reason, 0.0) for run in members) for reason in reasons}
        rows.append(
            KindRow(
                kind=kind,
                kernels=sorted({run.kernel for run in members}),
                count=len(ops) if all_ops else len(members),
                seconds=_per_op(members, "seconds", len(ops) if all_ops else len(members)),
                dram_read=_per_op(members, "dram_read", len(ops) if all_ops else len(members)),
                must_read=statistics.fmean(must_read[op] for op in ops) if all_ops else None,
                dram=_mean(members, "dram"),
                sm=_mean(members, "sm"),
                occupancy=_mean(members, "occupancy"),
                registers=_mean(members, "registers"),
                stalls=dict(sorted(stalls.items(), key=lambda item: item[1], reverse=True)),
            )
        )
    return sorted(rows, key=lambda row: (row.seconds or 0) * row.count, reverse=True)


def _values(runs: Sequence[KernelRun], field: str) -> list[float]:
    return [value for run in runs if (value := getattr(run, field)) is not None]


def _mean(runs: Sequence[KernelRun], field: str) -> float | None:
    values = _values(runs, field)
    return statistics.fmean(values) if values else None


def _per_op(runs: Sequence[KernelRun], field: str, ops: int) -> float | None:
    values = _values(runs, field)
    return sum(values) / ops if values else None


def table(rows: Sequence[KindRow]) -> str:
    """The rows as text."""
    counters = ["us", "DRAM MB read", "MB compulsory", "ratio", "DRAM %", "SM %", "occupancy %", "registers"]

    def text(value: float | None, digits: int, factor: float = 1.0) -> str:
        return "-" if value is None else f"{value * factor:.{digits}f}"

    cells = []
    for row in rows:
        ratio = row.dram_read / row.must_read if row.dram_read is not None and row.must_read else None
        stalls = [f"{reason} {value:.1f}" for reason, value in list(row.stalls.items())[:TOP_STALLS]]
        cells.append(
            [
                row.kind,
                str(row.count),
                text(row.seconds, 2, 1e6),
                text(row.dram_read, 3, 1e-6),
                text(row.must_read, 3, 1e-6),
                text(ratio, 3),
                text(row.dram, 1),
                text(row.sm, 1),
                text(row.occupancy, 1),
                text(row.registers, 0),
                ", ".join(stalls) or "-",
            ]
        )
    headers = ["op", "count", *counters, "stalls"]
    return render("table", headers, cells, text_columns=(0, len(headers) - 1))


def main() -> int:
    """Parse options, profile, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    nsight.model_options(parser)
    parser.add_argument("-o", "--out", type=Path, default=Path("decode"), help="report, without .ncu-rep")
    parser.add_argument("--read", type=Path, metavar="REPORT", help="do not profile: the table of this report")
    parser.add_argument("--ncu", type=Path, metavar="PATH", help="the tool, if it is not on PATH")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    report = options.read or options.out.with_name(options.out.name + ".ncu-rep")
    ops_file = report.with_suffix(".ops.json")
    try:
        ncu = nsight.find_tool("ncu", options.ncu)
        if not options.read:
            nsight.check_recording(options.out)
            child = [str(nsight.CHILD), *nsight.model_arguments(options), "--tokens=0", f"--ops-out={ops_file}"]
            print(f"profiling the kernels of one token into {report} (minutes)", file=sys.stderr)
            nsight.run(profile_command(ncu, options.out, child))
        pages = [parse_raw(nsight.run(read_command(ncu, report, renamed=renamed))) for renamed in (False, True)]
    except nsight.ToolError as error:
        return nsight.leave(error)
    ops = json.loads(ops_file.read_text()) if ops_file.exists() else []
    rows = by_kind(kernel_runs(*pages), {op["name"]: op["bytes"] for op in ops})
    if options.json:
        print(json_text({"report": str(report), "kernels": [asdict(row) for row in rows]}))
    else:
        print(table(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
