"""The README's picture of a layer, drawn from a trace that a GPU recorded."""

import json
from pathlib import Path

import numpy as np
import pytest

from numba_atomflow.backends.trace import StepTrace

RECORDED = Path(__file__).resolve().parents[1] / "recorded" / "step_trace.json"
EVENTS = ("begun", "staged", "done", "copy_begun", "copy_done", "waited")


def test_a_layer_is_drawn_with_every_op_and_a_legend(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws: pip install '.[plot]'")
    from docs_pictures import draw_readme_picture

    record = json.loads(RECORDED.read_text())
    trace = StepTrace(tuple(record["names"]), *(np.array(record[event], np.float64) for event in EVENTS))
    draw_readme_picture(trace, tmp_path / "layer.svg")
    picture = (tmp_path / "layer.svg").read_text()
    for text in ("qkv", "attention", "o", "gate_up", "down", "computing", "waiting for activations", "SM"):
        assert text in picture
