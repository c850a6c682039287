"""The GEMM with mma.sync against float64, at small shapes: in the simulator, or on a GPU."""

from typing import Any

from gemm_wgmma_cases import WgmmaCase, check_gemm
from kernel_cases import launch

from numba_atomflow.ops.cuda.gemm.epilogue import CONSUMERS
from numba_atomflow.ops.cuda.gemm.mma import make_gemm_mma, mma_shared_bytes
from numba_atomflow.ops.formats import FP8_E4M3_BITS, FP16

MMAS = (
    WgmmaCase("store", 130, 130, 16, stages=4, format=FP8_E4M3_BITS),  # 9 prepacked tiles for 16 warps
    WgmmaCase("swiglu", 140, 200, 16, ctas=2, stages=6),  # two tiles, with the stage of the epilogue
    WgmmaCase("store", 40, 330, 16, ctas=2, stages=4, format=FP16),
    WgmmaCase("add", 20, 100, 64, stages=4),  # copies of whole rows of threads
    # 6 units for 3 CTAs; k-tiles of 2 and of 1; more slots than a CTA has units of its first tile.
    WgmmaCase("add", 37, 384, 16, token_tiles=2, ctas=3, stages=8, format=FP8_E4M3_BITS, k_tile=2),
)


def check_mma(case: WgmmaCase) -> None:
    check_gemm(case, run)


def run(case: WgmmaCase, epilogue: Any, io: Any) -> None:
    plan = case.plan
    launch(make_gemm_mma(plan, epilogue), plan.ctas, CONSUMERS, mma_shared_bytes(plan, epilogue), io)
