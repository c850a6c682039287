"""Profile of a decode step: the time of each op, and of the whole step.

On a GPU, ops are launched one by one between events, and the step is a replay of the captured graph; the gap between
the sum of ops and the step is due to launches and overlap. Ops of the persistent kernel are timed by its trace, which
slows it a little: the gap may be negative.
"""

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from numba_atomflow.backends.base import DecodePath
from numba_atomflow.backends.trace import StepTrace
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.engine import Engine
from numba_atomflow.errors import OptionError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.host.machine import machine_record
from numba_atomflow.model.step import Op
from numba_atomflow.perf.timeline import draw_timeline
from numba_atomflow.utils.plot import plot_file
from numba_atomflow.utils.progress import Progress
from numba_atomflow.utils.stats import faster_half

WARM_UP = 2  # discarded runs
MOST_POSITIONS = 8  # from the depth on that are used: of several GPUs, steps are timed that are queued together
TURNS = 5  # in which ops and step alternate, so that a slow phase of the machine affects both


@dataclass(frozen=True)
class KernelRow:
    """All ops of one kind in a decode step: the 28 qkv projections of 28 layers, or the LM head.

    Attributes:
        count: ops per token.
        seconds: sum over these ops.
        moved_bytes: compulsory traffic, sum over these ops.
    """

    kind: str
    count: int
    seconds: float
    moved_bytes: int

    @property
    def gigabytes_per_second(self) -> float:
        """Compulsory traffic over time."""
        return self.moved_bytes / self.seconds / 1e9

    @property
    def mean_seconds(self) -> float:
        """Of one op."""
        return self.seconds / self.count


@dataclass(frozen=True)
class ProfileReport:
    """A profile, with the facts to repeat it. Times in seconds per token, over `repeats` runs."""

    model: str
    random_weights: bool
    geometry: ModelGeometry
    backend: str
    device: str
    depth: int  # tokens in the KV cache
    repeats: int
    ceilings: dict[str, float]  # achievable bandwidth in GB/s by way of reading, measured in this run
    kernels: list[KernelRow]  # by time, longest first
    step_seconds: float
    decode: DecodePath | None = None  # None on the CPU
    trace: StepTrace | None = None  # of the persistent kernel, if it ran the step
    machine: dict[str, Any] = field(default_factory=machine_record)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def ops_seconds(self) -> float:
        """Sum over all ops."""
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def ops_measured(self) -> str:
        """How ops were timed: "one by one", or "as traced" (in the persistent kernel)."""
        return "one by one" if self.trace is None else "as traced"

    @property
    def gap_seconds(self) -> float:
        """The whole step, without trace, minus the sum of ops; may be negative."""
        return self.step_seconds - self.ops_seconds

    @property
    def ceiling(self) -> tuple[str, float]:
        """Name and GB/s of the fastest way of reading memory."""
        return max(self.ceilings.items(), key=lambda item: item[1])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record."""
        best = self.ceiling[1]
        derived = [
            {
                "share_of_time": kernel.seconds / self.ops_seconds,
                "mean_seconds": kernel.mean_seconds,
                "gigabytes_per_second": kernel.gigabytes_per_second,
                "share_of_ceiling": kernel.gigabytes_per_second / best,
            }
            for kernel in self.kernels
        ]
        record = asdict(self)
        record["kernels"] = [kernel | more for kernel, more in zip(record["kernels"], derived, strict=True)]
        record["trace"] = self.trace and [asdict(row) for row in self.trace.phases()]
        sums = {"ops_seconds": self.ops_seconds, "ops_measured": self.ops_measured, "gap_seconds": self.gap_seconds}
        return record | sums


def profile(engine: Engine, depth: int = 0, repeats: int = 20, progress: Progress | None = None) -> ProfileReport:
    """Profile a decode step after `depth` tokens.

    Args:
        engine: its KV cache is overwritten.
        depth: tokens in the KV cache.
        repeats: runs, of which the faster half counts; rounded up to a multiple of `TURNS`.
        progress: called with parts done and parts in all.

    Raises:
        OptionError: `depth` or `repeats` is out of range.
        ContextError: the KV cache is too small.
    """
    check_profile(depth, repeats)

    turns = min(TURNS, repeats)
    runs_per_turn = -(-repeats // turns)

    def report(what: str, done: int) -> None:
        if progress:
            progress(what, done, turns + 2)

    backend = engine.backend
    report("achievable bandwidth", 0)
    ceilings = backend.measure.ceilings()
    report(f"filling the KV cache with {depth} tokens", 1)
    engine.reset()
    engine.feed(np.random.default_rng(0).integers(0, engine.geometry.vocabulary, depth + 1).tolist())
    engine.rewind(depth)
    backend.measure.time_step(WARM_UP)
    trace = backend.measure.trace_step(runs_per_turn, progress)  # compiles the tracing kernel, so before the turns
    timed_ops, timed_steps = [], []
    for turn in range(turns):
        report("ops and step", turn + 2)
        timed_ops.append(backend.measure.time_ops(runs_per_turn))
        timed_steps.append(backend.measure.time_step(runs_per_turn))
    report("ops and step", turns + 2)
    ops = [op for op, _ in timed_ops[0]]
    seconds = faster_half([[took for _, took in timed] for timed in timed_ops]).tolist()
    return ProfileReport(
        model=str(engine.checkpoint.path),
        random_weights=isinstance(engine.checkpoint, RandomModel),
        geometry=engine.geometry,
        backend=backend.name,
        device=backend.device,
        depth=depth,
        repeats=turns * runs_per_turn,
        ceilings=ceilings,
        kernels=kernel_rows(list(zip(ops, seconds, strict=True)), depth + 1),
        step_seconds=float(faster_half([[took] for took in timed_steps])[0]),
        decode=backend.decode_path,
        trace=trace,
    )


def check_profile(depth: int, repeats: int) -> None:
    """Check options before a model is loaded.

    Raises:
        OptionError: a number is out of range.
    """
    if depth < 0:
        raise OptionError(f"depth is {depth}; it must be 0 or more.")
    if repeats < 1:
        raise OptionError(f"repeats is {repeats}; it must be at least 1.")


def check_timeline(engine: Engine) -> None:
    """Check before measuring that there is a persistent kernel to trace.

    Raises:
        OptionError: this engine does not decode with the persistent kernel.
    """
    path = engine.backend.decode_path
    if path is None:
        raise OptionError("--timeline shows the persistent kernel of a GPU, and this is the CPU backend; use --plot.")
    if path.name != "persistent":
        raise OptionError(f"--timeline shows the persistent kernel, and this model decodes by {path}; use --plot.")


def kernel_rows(ops: list[tuple[Op, float]], length: int) -> list[KernelRow]:
    """Ops and their seconds, summed by kind; attention reads `length` positions of the KV cache."""
    kinds: dict[str, list[tuple[Op, float]]] = {}
    for op, seconds in ops:
        kinds.setdefault(op.kind, []).append((op, seconds))
    rows = [
        KernelRow(
            kind=kind,
            count=len(members),
            seconds=sum(seconds for _, seconds in members),
            moved_bytes=sum(op.moved_bytes(length) for op, _ in members),
        )
        for kind, members in kinds.items()
    ]
    return sorted(rows, key=lambda row: row.seconds, reverse=True)


def plot(report: ProfileReport, path: Path) -> None:
    """Draw time and bandwidth of every kernel beside the achievable bandwidth.

    Raises:
        DestinationError: the file cannot be written.
    """
    rows = report.kernels
    names = [f"{row.kind} x {row.count}" for row in rows]
    best, bandwidth = report.ceiling
    with plot_file(path, 10, 2.6 + 0.38 * len(rows)) as figure:
        times, speeds = figure.subplots(1, 2, sharey=True)
        times.barh(names, [row.seconds * 1e6 for row in rows], color="tab:blue", label="measured")
        at_best = [row.moved_bytes / bandwidth / 1e3 for row in rows]
        times.barh(names, at_best, 0.35, color="tab:orange", label=f"compulsory traffic at {best} bandwidth")
        times.set_xlabel("time per token, µs")
        times.invert_yaxis()  # what takes longest at the top
        speeds.barh(names, [row.gigabytes_per_second for row in rows], color="tab:blue")
        for (name, ceiling), style in zip(report.ceilings.items(), cycle(("--", ":")), strict=False):
            speeds.axvline(ceiling, linestyle=style, lw=2, color="tab:red", label=f"{name}: {ceiling:,.0f} GB/s")
        speeds.set_xlabel("compulsory traffic over time, GB/s")
        for axes, columns in ((times, 1), (speeds, 1)):
            axes.grid(axis="x", color="0.9")
            axes.legend(ncols=columns, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
        speeds.get_legend().set_title("achievable bandwidth", {"size": 11})
        speeds.get_legend().set_alignment("left")
        figure.suptitle(
            f"{report.model}, {report.depth} tokens in the KV cache, {report.device}\n"
            f"decode step {report.step_seconds * 1e6:,.0f} µs; "
            f"its ops, timed {report.ops_measured}, {report.ops_seconds * 1e6:,.0f} µs"
        )


def plot_timeline(report: ProfileReport, path: Path) -> None:
    """Draw the report's trace: the phases of every kind of op, and one layer SM by SM.

    Raises:
        DestinationError: the file cannot be written.
    """
    if report.trace is None:
        raise ValueError("the step was not traced")
    title = (
        f"{report.model}, {report.depth} tokens in the KV cache, {report.device}\n"
        f"persistent kernel with trace {report.trace.ends[-1] / 1e3:,.0f} µs; "
        f"decode step without trace {report.step_seconds * 1e6:,.0f} µs"
    )
    draw_timeline(report.trace, title, path)
