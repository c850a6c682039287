"""What a sampler's start copies to a GPU."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the CUDA backend's; there is none for macOS")

from numba_atomflow.backends.cuda.model import SamplerWriter
from numba_atomflow.backends.cuda.plan import SamplingState
from numba_atomflow.memory.view import View, view_of
from numba_atomflow.sampling import Sampler, SamplingParams

VOCABULARY = 40


class HostWrites:
    """In place of `StagedWrites`."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def write(self, view: View, values: Any) -> None:
        view.host_array()[...] = values
        self.written.append(view.name)


def test_only_what_makes_a_difference_is_written() -> None:
    arrays: dict[str, Any] = {
        "seen": np.zeros(2, np.uint32),
        "options": np.zeros(5),
        "generator": np.zeros(2, np.uint64),
    }
    arrays |= {"best": np.zeros(1, np.int64), "sums": np.zeros(1, np.int64), "tokens_posted": np.zeros(1, np.int64)}
    staged = HostWrites()
    writer = SamplerWriter(staged, SamplingState(*(view_of(name, arrays[name]) for name in SamplingState._fields)))  # type: ignore[arg-type]

    def written(**options: Any) -> list[str]:
        staged.written.clear()
        writer.write(Sampler(SamplingParams(**options), VOCABULARY, [3, 33]))
        return staged.written

    assert written() == ["options"]
    assert arrays["options"].tolist() == [0, 0, 1, 0, 1]
    assert written() == []
    assert written(temperature=0.5, seed=7) == ["options", "generator"]
    assert arrays["options"].tolist() == [0.5, 0, 1, 0, 1]
    arrays["generator"][1] = 4  # draws
    assert written(temperature=0.5, seed=7) == ["generator"]
    assert arrays["generator"].tolist() == [7, 0]
    assert written(repetition_penalty=1.5) == ["options", "seen"]
    assert arrays["seen"].tolist() == [1 << 3, 1 << 1]
