"""Reports of the sandbox's commands, as text and as JSON records."""

from typing import TYPE_CHECKING, Any

from numba_atomflow.utils.tables import render

if TYPE_CHECKING:
    from numba_atomflow.sandbox.compare import Comparison
    from numba_atomflow.sandbox.report import Percentiles, ServingReport
    from numba_atomflow.sandbox.requests import Request


def request_record(request: "Request") -> dict[str, Any]:
    """A finished request, JSON-ready."""
    return {
        "id": request.id,
        "arrival_seconds": request.arrival,
        "prompt_tokens": len(request.prompt),
        "token_ids": request.output,
        "finish_reason": request.finish_reason,
        "ttft_seconds": request.ttft,
        "tpot_seconds": request.tpot,
        "shared_tokens": request.shared_tokens,
        "preemptions": request.preemptions,
    }


def run_table(report: "ServingReport", model: str, device: str) -> str:
    """The report of `sandbox run`, a line per metric."""
    mean, peak = report.mean_utilisation, report.peak_utilisation
    rows = [
        ("model", model),
        ("device", device),
        ("served", f"{report.requests} requests, {report.prompt_tokens} prompt tokens, {report.tokens} tokens"),
        ("throughput", f"{report.throughput:.1f} tok/s over {report.seconds:.2f} s"),
        ("TTFT", _percentiles(report.ttft, 1e3, "ms")),
        ("TPOT", _percentiles(report.tpot, 1e3, "ms", 2)),
        ("latency", _percentiles(report.latency, 1e3, "ms")),
        ("KV blocks", f"{report.blocks} of {report.block_size} positions, {mean:.0%} in use (peak {peak:.0%})"),
        ("preemptions", str(report.preemptions)),
        ("copy-on-write", f"{report.block_copies} blocks"),
        ("prefix hits", f"{report.shared_tokens} tokens"),
        ("steps", f"{report.steps}, {report.mean_columns:.1f} tokens each"),
        ("scheduler", _percentiles(report.schedule, 1e6, "us per step")),
        ("block tables", _percentiles(report.table, 1e6, "us per step")),
        ("model", _percentiles(report.model, 1e3, "ms per step", 2)),
    ]
    return "".join(f"{name:<16} {value}\n" for name, value in rows)


def _percentiles(seconds: "Percentiles | None", factor: float, unit: str, digits: int = 1) -> str:
    if seconds is None:
        return "-"
    p50, p90, p99 = (f"{value * factor:.{digits}f}" for value in (seconds.p50, seconds.p90, seconds.p99))
    return f"{p50} / {p90} / {p99} {unit} (50th, 90th, 99th percentile)"


def comparison_tables(comparison: "Comparison") -> str:
    """The report of `sandbox compare`."""
    attention = [
        [
            str(row.context),
            str(row.block_size),
            f"{row.static_seconds * 1e6:.2f}",
            f"{row.paged_seconds * 1e6:.2f}",
            f"{row.paged_seconds / row.static_seconds:.3f}",
        ]
        for row in comparison.attention
    ]
    steps = [
        [
            str(row.batch),
            str(row.context),
            str(row.block_size),
            f"{row.static_seconds * 1e3:.3f}",
            f"{row.paged_seconds * 1e3:.3f}",
            f"{row.wall_seconds * 1e3:.3f}",
            f"{row.tokens_per_second:.0f}",
            *(f"{share:.1%}" for share in row.shares().values()),
        ]
        for row in comparison.steps
    ]
    step_headers = ["batch", "context", "block size", "static ms", "paged ms", "served ms", "tok/s"]
    step_headers += ["indirection", "block tables", "scheduling", "host"]
    return (
        f"model: {comparison.model}\ndevice: {comparison.device}\nmedians of {comparison.repeats} runs\n\n"
        "Attention of one layer, one token\n\n"
        + render("table", ["context", "block size", "static us", "paged us", "paged/static"], attention)
        + "\nDecode step, static and paged on the device, served end to end\n\n"
        + render("table", step_headers, steps)
    )
