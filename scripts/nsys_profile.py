"""A timeline of decoding for Nsight Systems, and its table of kernels.

    python scripts/nsys_profile.py                                       # the demo model
    python scripts/nsys_profile.py --geometry llama-3.2-3b --depth 2048 --out decode
    python scripts/nsys_profile.py --read decode.nsys-rep                # the table of an earlier report

Only decode steps are recorded, without loading, compiling and prefill. Tokens are NVTX ranges, and kernels of the
captured graph are traced one by one; one more token runs op by op, with a range per op. `nsys-ui` opens the report.
Needs Nsight Systems and the extra `profile` (nvtx).
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import nsight

from numba_atomflow.utils.json_text import json_text
from numba_atomflow.utils.tables import render

REPORT = "cuda_gpu_kern_sum"


@dataclass(frozen=True)
class KernelSummary:
    """A row of the table: times in nanoseconds."""

    name: str
    instances: int
    total_ns: float
    mean_ns: float
    median_ns: float


def profile_command(nsys: str, out: Path, child: Sequence[str]) -> list[str]:
    """The command that records the range `nsight.CAPTURED` of a Python program."""
    return [
        nsys,
        "profile",
        f"--output={out}",
        "--force-overwrite=true",
        "--trace=cuda,nvtx",
        "--sample=none",
        "--cpuctxsw=none",
        "--cuda-graph-trace=node",
        "--capture-range=nvtx",
        f"--nvtx-capture={nsight.CAPTURED}",
        "--capture-range-end=stop",  # stop recording, but let the program finish
        "--env-var=NSYS_NVTX_PROFILER_REGISTER_ONLY=0",  # the range's name is not registered
        sys.executable,
        *child,
    ]


def check_report(report: Path) -> None:
    """Check that nsys converted its recording into a report.

    Raises:
        ToolError: it did not.
    """
    raw = report.with_suffix(".qdstrm")
    if raw.exists() and not report.exists():
        raise nsight.ToolError(
            f"nsys recorded {raw} but made no report of it: its importer is missing (the copy of nsys inside "
            "Nsight Compute has none); open the file with a complete Nsight Systems, or give its path with --nsys."
        )


def stats_command(nsys: str, report: Path) -> list[str]:
    """Print the table of kernels as CSV."""
    return [nsys, "stats", f"--report={REPORT}", "--format=csv", "--output=-", "--force-export=true", str(report)]


def parse_kernels(text: str) -> list[KernelSummary]:
    """Parse the table in the output of `stats_command`; other lines are ignored.

    Raises:
        ToolError: there is none: nothing ran on a GPU, or the driver refused tracing.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("Time (%),") and "Instances" in line), None)
    if start is None:
        said = next((line.strip().rstrip(".") for line in lines if "SKIPPED" in line), "nsys says no more")
        raise nsight.ToolError(f"The report holds no GPU kernels ({said}); was the CUDA backend used?")
    rows = []
    for record in csv.DictReader(lines[start:]):
        if not record.get("Name"):  # the empty line after the table
            break
        rows.append(
            KernelSummary(
                name=record["Name"],
                instances=int(record["Instances"]),
                total_ns=float(record["Total Time (ns)"]),
                mean_ns=float(record["Avg (ns)"]),
                median_ns=float(record["Med (ns)"]),
            )
        )
    return rows


def table(rows: Sequence[KernelSummary], tokens: int | None) -> str:
    """The kernels, longest first; `tokens` were decoded (None: unknown)."""
    total = sum(row.total_ns for row in rows)
    headers = ["kernel", "share", "per token" if tokens else "count", "mean us", "median us"]
    cells = [
        [
            row.name,
            f"{row.total_ns / total:.1%}",
            f"{row.instances / tokens:.1f}" if tokens else str(row.instances),
            f"{row.mean_ns / 1e3:.2f}",
            f"{row.median_ns / 1e3:.2f}",
        ]
        for row in sorted(rows, key=lambda row: row.total_ns, reverse=True)
    ]
    in_all = f"kernels take {total / 1e3 / tokens:.1f} us a token" if tokens else f"kernels take {total / 1e3:.1f} us"
    return render("table", headers, cells) + f"\n{in_all}\n"


def main() -> int:
    """Parse options, record, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    nsight.model_options(parser)
    parser.add_argument("-n", "--tokens", type=int, default=16, help="tokens to record (default: 16)")
    parser.add_argument("-o", "--out", type=Path, default=Path("decode"), help="report, without .nsys-rep")
    parser.add_argument("--read", type=Path, metavar="REPORT", help="do not record: the table of this report")
    parser.add_argument("--nsys", type=Path, metavar="PATH", help="the tool, if it is not on PATH")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    try:
        nsys = nsight.find_tool("nsys", options.nsys)
        if options.read:
            report, tokens = options.read, None
        else:
            nsight.check_recording(options.out)
            report, tokens = options.out.with_name(options.out.name + ".nsys-rep"), options.tokens + 1
            child = [str(nsight.CHILD), *nsight.model_arguments(options), "--tokens", str(options.tokens)]
            print(f"recording {options.tokens} tokens into {report}", file=sys.stderr)
            nsight.run(profile_command(nsys, options.out, child))
            check_report(report)
        rows = parse_kernels(nsight.run(stats_command(nsys, report)))
    except nsight.ToolError as error:
        return nsight.leave(error)
    if options.json:
        print(json_text({"report": str(report), "tokens": tokens, "kernels": [asdict(row) for row in rows]}))
    else:
        print(table(rows, tokens), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
