"""A traced decode step as a picture: what each kind of op does with its time, and one layer block by block."""

from pathlib import Path
from typing import Any

import numpy as np

from numba_atomflow.backends.trace import StepTrace
from numba_atomflow.utils.plot import save_figure

# What the phases of `PhaseRow` are called, and their colours.
_PHASES = {
    "staging": ("waiting for what it reads", "tab:orange"),
    "copy_wait": ("waiting for weights", "tab:red"),
    "compute": ("computing", "tab:blue"),
    "barrier": ("waiting for the slowest block", "lightgray"),
}
_KINDS = {"qkv": "tab:purple", "attention": "tab:green", "o": "tab:brown", "gate_up": "tab:cyan", "down": "tab:pink"}
_BAR = 0.6  # height of a block's bar; the line of its copies runs between it and the next block's


def draw_timeline(trace: StepTrace, title: str, path: Path) -> None:
    """Draw the phases of all kinds of ops, and one layer in the middle of the model.

    Raises:
        DestinationError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 11), layout="constrained")
    phases, layer = figure.subplots(1, 2, width_ratios=(2, 3))
    _draw_phases(phases, trace)
    _draw_layer(layer, trace)
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path)


def _draw_phases(axes: Any, trace: StepTrace) -> None:
    rows = trace.phases()
    names = [f"{row.kind} x {row.count}\n{row.seconds * 1e6:.1f} us each" for row in rows]
    left = np.zeros(len(rows))
    for phase, (label, colour) in _PHASES.items():
        widths = np.array([getattr(row, f"{phase}_seconds") * row.count * 1e6 for row in rows])
        axes.barh(names, widths, left=left, color=colour, label=label)
        left += widths
    axes.margins(y=0.02)
    axes.invert_yaxis()  # the first op at the top
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(_KINDS.get(row.kind, "black"))
    axes.set_xlabel("us per token, mean over blocks")
    axes.legend(fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))


def _draw_layer(axes: Any, trace: StepTrace) -> None:
    layers = len({name.split(".")[1] for name in trace.names if name.startswith("layer.")})
    middle = f"layer.{layers // 2}."
    ops = [op for op, name in enumerate(trace.names) if name.startswith(middle)]
    blocks = np.arange(len(trace.done))
    zero = trace.ends[ops[0] - 1]
    for op in ops:
        begun, staged, done, asked, asked_last = (
            (times[:, op] - zero) / 1e3
            for times in (trace.begun, trace.staged, trace.done, trace.copy_begun, trace.copy_done)
        )
        kind = trace.names[op].removeprefix(middle)
        colour = _KINDS.get(kind, "black")
        worked, copied = ~np.isnan(staged), ~np.isnan(asked)
        axes.barh(blocks[worked], (staged - begun)[worked], _BAR, begun[worked], color=colour, alpha=0.3)
        axes.barh(blocks[worked], (done - staged)[worked], _BAR, staged[worked], color=colour, label=kind)
        axes.hlines(blocks[copied] + 0.5, asked[copied], asked_last[copied], color=colour, lw=0.8)
        axes.axvline((trace.ends[op] - zero) / 1e3, color=colour, linestyle=":", lw=1)
    first = np.nanmin(trace.begun[:, ops[0]])
    axes.set_xlim((min(first, zero) - zero) / 1e3, (trace.ends[ops[-1]] - zero) / 1e3 * 1.01)
    axes.set_ylim(len(blocks), -1)
    axes.set_xlabel(
        f"us since layer {layers // 2} began; lighter: waiting for what it reads; thin lines: weights asked for; "
        "dotted: the last block is done"
    )
    axes.set_ylabel("multiprocessor")
    axes.legend(fontsize=8, ncols=len(ops), loc="lower left", bbox_to_anchor=(0, 1))
