"""Epilogues of GEMM kernels in numba's CUDA simulator (checks: tests/support/gemm_epilogue_cases.py)."""

import numpy as np
import pytest
from gemm_epilogue_cases import EPILOGUES, EpilogueCase, check_epilogue
from kernel_cases import launch

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.arguments import GemmAddArguments
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan
from numba_atomflow.ops.cuda.gemm.staged import make_staged_add_epilogue
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout


@pytest.mark.parametrize("case", EPILOGUES, ids=str)
def test_epilogue(case: EpilogueCase) -> None:
    check_epilogue(case)


def test_the_residual_of_a_tile_is_prefetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, rows, units = 192, 208, 7  # of the second tile of rows, 80 of 128 exist
    plan = GemmPlan(PrepackedLayout(rows, units * 128, 0), ActivationTiles(units * 128, 2 * tokens), tokens, 2, 1)
    prefetch, found = make_staged_add_epilogue(plan).prefetch, list[int]()
    monkeypatch.setattr(ptx, "prefetch_l2", lambda _, index: found.append(int(index)))

    @ptx.kernel(1, 1)
    def prefetch_tile(io):
        for unit in range(units):
            for lane in range(32):
                prefetch(io, 1, tokens, unit, lane)

    nothing = np.zeros(1, np.uint32)
    residual = np.zeros(1, np.float32)
    arguments = GemmAddArguments(weights=nothing, x=nothing, partials=residual, token_tiles=2, residual=residual)
    launch(prefetch_tile, 1, 1, 0, arguments)
    lines = [token * rows + row for token in range(tokens, 2 * tokens) for row in range(128, rows, 32)]
    assert sorted(found) == lines
