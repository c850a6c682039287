"""The GEMM kernels of a step: a main loop for the GPU's tensor cores, and an epilogue.

Every factory makes a kernel for `plan.ctas` CTAs, with the main loop of `plan.instructions`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from numba_atomflow.ops.cuda.gemm.arguments import (
    GemmAddArguments,
    GemmQkvArguments,
    GemmStoreArguments,
    GemmSwigluArguments,
)
from numba_atomflow.ops.cuda.gemm.epilogue import (
    CONSUMERS,
    GemmEpilogue,
    make_store_epilogue,
    make_swiglu_epilogue,
)
from numba_atomflow.ops.cuda.gemm.mma import make_gemm_mma, mma_shared_bytes
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan, mma_ctas_per_sm
from numba_atomflow.ops.cuda.gemm.staged import choose_add_epilogue, choose_qkv_epilogue
from numba_atomflow.ops.cuda.gemm.wgmma import THREADS, make_gemm_wgmma, wgmma_shared_bytes
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.runtime.spec import Planned, kernel_spec


def make_gemm_store(plan: GemmPlan, *, dependent: bool = False) -> Any:
    """Kernel (`GemmStoreArguments`)."""
    return _main_loop(plan)(plan, make_store_epilogue(plan), dependent=dependent)


def make_gemm_add(plan: GemmPlan, *, dependent: bool = False) -> Any:
    """Kernel (`GemmAddArguments`)."""
    return _main_loop(plan)(plan, choose_add_epilogue(plan), dependent=dependent)


def make_gemm_swiglu(plan: GemmPlan, intermediate: ActivationTiles, *, dependent: bool = False) -> Any:
    """Kernel (`GemmSwigluArguments`). `intermediate`: x of the down projection."""
    return _main_loop(plan)(plan, make_swiglu_epilogue(plan, intermediate), dependent=dependent)


def make_gemm_qkv(plan: GemmPlan, heads: int, kv_heads: int, *, dependent: bool = False) -> Any:
    """Kernel (`GemmQkvArguments`)."""
    return _main_loop(plan)(plan, choose_qkv_epilogue(plan, heads, kv_heads), dependent=dependent)


def gemm_kernel(name: str, factory: Callable[..., Any], plan: GemmPlan, dependent: bool, **options: Any) -> Planned:
    """A kernel of this module and its grid.

    Args:
        factory: one of this module; `options` are its arguments beside the plan.
        dependent: launched with programmatic dependent launch, unless its CTAs wait for each other and an SM must hold
            two: beside a CTA of the kernel before, with the shared memory that its SM was given for that, there may be
            room for one only.
    """
    signature, make_epilogue = _KINDS[factory]
    epilogue, wgmma = make_epilogue(plan, **options), plan.instructions == "wgmma"
    dependent = dependent and (wgmma or mma_ctas_per_sm(plan.layout, plan.tile_tokens) == 1)
    spec = kernel_spec(
        name,
        factory,
        signature,
        THREADS if wgmma else CONSUMERS,
        wgmma_shared_bytes(plan, epilogue) if wgmma else mma_shared_bytes(plan, epilogue),
        plan=plan,
        dependent=dependent,
        **options,
    )
    several = not wgmma or plan.resident > 1  # CTAs on an SM
    return Planned(replace(spec, arch_specific=wgmma, whole_carveout=several), plan.ctas)


def _main_loop(plan: GemmPlan) -> Callable[..., Any]:
    """(plan, epilogue, dependent) -> kernel."""
    return make_gemm_wgmma if plan.instructions == "wgmma" else make_gemm_mma


_KINDS: dict[Callable[..., Any], tuple[Any, Callable[..., GemmEpilogue]]] = {
    make_gemm_store: (GemmStoreArguments, make_store_epilogue),
    make_gemm_add: (GemmAddArguments, choose_add_epilogue),
    make_gemm_swiglu: (GemmSwigluArguments, make_swiglu_epilogue),
    make_gemm_qkv: (GemmQkvArguments, choose_qkv_epilogue),
}
