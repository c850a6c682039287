"""A traced decode step as a plot: the phases of every kind of op, and one layer SM by SM."""

from pathlib import Path
from typing import Any

import numpy as np

from numba_atomflow.backends.trace import StepTrace
from numba_atomflow.utils.plot import plot_file

# Phases of `PhaseRow`: label and colour.
_PHASES = {
    "staging": ("waiting for activations", "tab:orange"),
    "copy_wait": ("waiting for weights", "tab:red"),
    "compute": ("computing", "tab:blue"),
    "barrier": ("waiting for the slowest SM", "0.75"),
}
_KINDS = {"qkv": "tab:purple", "attention": "tab:green", "o": "tab:brown", "gate_up": "tab:cyan", "down": "tab:pink"}
_BAR = 0.6  # height of an SM's bar; its line of copies lies between this bar and the next


def draw_timeline(trace: StepTrace, title: str, path: Path) -> None:
    """Draw the phases of all kinds of ops, and one layer in the middle of the model.

    Raises:
        DestinationError: the file cannot be written.
    """
    with plot_file(path, 10, 11) as figure:
        phases, layer = figure.subplots(2, 1, height_ratios=(2, 5))
        _draw_phases(phases, trace)
        draw_layer(layer, trace)
        figure.suptitle(title)


def _draw_phases(axes: Any, trace: StepTrace) -> None:
    rows = trace.phases()
    names = [f"{row.kind} x {row.count}" for row in rows]
    left = np.zeros(len(rows))
    for phase, (label, colour) in _PHASES.items():
        widths = np.array([getattr(row, f"{phase}_seconds") * row.count * 1e6 for row in rows])
        axes.barh(names, widths, left=left, color=colour, label=label)
        left += widths
    for i, row in enumerate(rows):
        axes.annotate(f" {row.seconds * 1e6:.1f} µs each", (left[i], i), va="center")
    axes.margins(x=0.15, y=0.02)
    axes.invert_yaxis()  # the first op at the top
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(_KINDS.get(row.kind, "black"))
    axes.set_xlabel("time per token, µs (mean over SMs)")
    _legend(axes, axes.get_legend_handles_labels()[0])


def draw_layer(axes: Any, trace: StepTrace, most_sms: int | None = None) -> None:
    """Draw one layer in the middle of the model, a row per SM; with `most_sms` only so many of them."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    layers = len({name.split(".")[1] for name in trace.names if name.startswith("layer.")})
    middle = f"layer.{layers // 2}."
    ops = [op for op, name in enumerate(trace.names) if name.startswith(middle)]
    sms = np.arange(len(trace.done))[:most_sms]
    zero = trace.ends[ops[0] - 1]
    handles: list[Any] = []
    for op in ops:
        begun, staged, done, first_copy, last_copy = (
            (times[: len(sms), op] - zero) / 1e3
            for times in (trace.begun, trace.staged, trace.done, trace.copy_begun, trace.copy_done)
        )
        kind = trace.names[op].removeprefix(middle)
        colour = _KINDS.get(kind, "black")
        worked, copied = ~np.isnan(staged), ~np.isnan(first_copy)
        axes.barh(sms[worked], (staged - begun)[worked], _BAR, begun[worked], color=colour, alpha=0.3)
        axes.barh(sms[worked], (done - staged)[worked], _BAR, staged[worked], color=colour)
        axes.hlines(sms[copied] + 0.5, first_copy[copied], last_copy[copied], color=colour, lw=0.8)
        axes.axvline((trace.ends[op] - zero) / 1e3, color=colour, linestyle=":", lw=1.5)
        handles.append(Patch(color=colour, label=kind))
    handles += [
        Patch(color="0.3", label="computing"),
        Patch(color="0.3", alpha=0.3, label="waiting for activations"),
        Line2D([], [], color="0.3", lw=1, label="issuing weight copies"),
        Line2D([], [], color="0.3", lw=1.5, linestyle=":", label="last SM done"),
    ]
    earliest = np.nanmin(trace.begun[:, ops[0]])
    axes.set_xlim((min(earliest, zero) - zero) / 1e3, (trace.ends[ops[-1]] - zero) / 1e3 * 1.01)
    axes.set_ylim(len(sms), -1)
    axes.set_xlabel(f"time since layer {layers // 2} began, µs")
    axes.set_ylabel("SM")
    _legend(axes, handles)


def _legend(axes: Any, handles: list[Any]) -> None:
    """Above the axes, so that it hides nothing."""
    axes.legend(handles=handles, ncols=5, loc="lower left", bbox_to_anchor=(0, 1), frameon=False, columnspacing=1.2)
