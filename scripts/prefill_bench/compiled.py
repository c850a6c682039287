"""The kernels of cases, compiled before there is a GPU, and machine code from a compile cache of another machine.

A file of the cache is named by kernel, architecture, factory arguments and the versions of the compilers; the folder by
a hash of the sources. Machine code that other versions of the compilers have made of the same sources runs as well, as
long as the driver is not older than they are: `adopt` puts it under the names that this machine looks for.
"""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from numba_atomflow.backends.cuda.decode_path import kernels_for
from numba_atomflow.errors import OptionError
from numba_atomflow.model.presets import find_preset
from numba_atomflow.ops import jit
from numba_atomflow.ops.cuda.runtime import bandwidth
from numba_atomflow.ops.cuda.runtime.build import cache_path
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.ops.cuda.runtime.spec import KernelSpec
from prefill_bench.attention_plans import attention_kernel, attention_plan, other_plans
from prefill_bench.cases import PEER, Case
from prefill_bench.expectations import CHUNK

H200 = Chip(132, 232448, (9, 0))
_SHARED_BYTES = {(8, 0): 166912, (8, 9): 101376, (9, 0): 232448, (12, 0): 101376}


def chip_with(capability: str) -> Chip:
    """A chip of this compute capability with as many SMs as an H200.

    Raises:
        OptionError: there are no kernels for it.
    """
    known = {".".join(map(str, version)): version for version in _SHARED_BYTES}
    if capability not in known:
        raise OptionError(f"--compile {capability} is no compute capability here; choose of {', '.join(known)}.")
    version = known[capability]
    return Chip(H200.sms, _SHARED_BYTES[version], version)


def specs_of(cases: Iterable[Case], chip: Chip) -> list[KernelSpec]:
    """Every kernel of these cases, each once."""
    return list(dict.fromkeys(spec for case in cases for spec in _specs_of(case, chip)))


def _specs_of(case: Case, chip: Chip) -> Iterator[KernelSpec]:
    if case.subject == PEER:
        return
    match case.part:
        case "ceilings":
            yield bandwidth.read_kernel(chip.sms).spec
            if chip.capability >= (9, 0):
                yield bandwidth.bulk_read_kernel(chip.sms).spec
        case "projections":
            from prefill_bench.gemm_kernels import gemm_variants

            variants = gemm_variants(find_preset(case.model), case.subject, case.tokens, chip)
            yield from (variant.planned.spec for variant in variants if variant.chosen or case.variants)
        case "attention":
            plan = attention_plan(find_preset(case.model), chip)
            plans = [plan, *(other_plans(plan).values() if case.variants else ())]
            yield from (attention_kernel(each, chip).spec for each in plans)
        case _:
            yield from _engine_specs(case, chip)


def _engine_specs(case: Case, chip: Chip) -> Iterator[KernelSpec]:
    """What loading an engine, a prompt and decode steps need."""
    chunk, fp8 = 0 if case.subject == "gemv" else CHUNK, case.subject == "fp8"
    kernels, _ = kernels_for(find_preset(case.model), chip, "fp8", "auto", chunk=chunk, fp8_activations=fp8)
    planned = list(kernels.start)
    for start in range(0, case.tokens, kernels.prefill_chunk):
        tokens = min(case.tokens - start, kernels.prefill_chunk)
        planned += kernels.chunk_kernels(tokens)
    yield from dict.fromkeys(kernel.spec for kernel in planned)


def adopt(folder: Path) -> int:
    """Copy machine code into this machine's compile cache, under the names that it looks for; how many kernels.

    Args:
        folder: a cache folder for the same sources, or one that holds it.

    Raises:
        OptionError: it holds no code for these sources.
    """
    own = jit.cache_folder("cuda")
    if own is None:
        raise OptionError("The compile cache cannot be written; set NUMBA_ATOMFLOW_HOME to a folder that can be.")
    sources = [path for path in (folder, *folder.rglob("*")) if path.is_dir() and path.name == own.name]
    if not sources:
        raise OptionError(f"{folder} has no folder {own.name}: it was made from other sources; compile again.")
    name = cache_path(bandwidth.read_kernel(H200.sms).spec, H200.capability)
    assert name is not None
    suffix = name.name.rpartition("-")[2]  # of this machine's compilers
    found = [path for source in sources for path in source.glob("*.cubin")]
    for path in found:
        target = own / f"{path.name.rpartition('-')[0]}-{suffix}"
        if not target.exists():
            shutil.copyfile(path, target)
    return len(found)
