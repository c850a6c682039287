"""PTX of a checkout's GPU kernels as JSON, for `ptx_diff.py`, which starts this with the checkout first on PYTHONPATH.

    python scripts/ptx_dump.py FOLDER '{"only": "", "architectures": ["sm_90"], "part": 0, "parts": 1}'

FOLDER is the checkout. One line of JSON per kernel and architecture, as soon as it is there. It reads the catalogue of
that checkout, and is written so that catalogues of older revisions can be read as well.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CAPABILITIES = {"sm_80": (8, 0), "sm_89": (8, 9), "sm_90": (9, 0), "sm_120": (12, 0)}
PERSISTENT = ("sm_90", "sm_120")  # architectures that run it


def main() -> int:
    folder, task = Path(sys.argv[1]), json.loads(sys.argv[2])
    support = folder / "tests" / "support"
    sys.path[:0] = [str(support if support.exists() else folder / "tests"), str(folder / "tests" / "ptx")]
    by_name: dict[str, list[tuple[str, Any]]] = {}
    for architecture in task["architectures"]:
        for name, spec in entries(architecture):
            if re.search(task["only"], name):
                by_name.setdefault(name, []).append((architecture, spec))
    share = sorted(by_name)[task["part"] :: task["parts"]]
    for name in share:
        for architecture, spec in by_name[name]:
            print(json.dumps({"name": name, "architecture": architecture, "ptx": ptx(spec, architecture)}), flush=True)
    return 0


def entries(architecture: str) -> Iterator[tuple[str, Any]]:
    """Names and specs of the checkout's kernels."""
    import kernel_catalogue

    capability = CAPABILITIES[architecture]
    for entry in kernel_catalogue.catalogue(capability):
        yield entry.name, entry.spec
    if architecture not in PERSISTENT:
        return
    if hasattr(kernel_catalogue, "persistent_catalogue"):
        for entry in kernel_catalogue.persistent_catalogue(capability):
            yield entry.name, entry.spec
        return
    # Before persistent_catalogue the geometries were in a test, and the catalogue's constants had other names.
    import test_persistent as test

    for model, geometry in {"SmolLM2": test.SMOLLM2, "Llama 1B": test.LLAMA}.items():
        chip = test.Chip(test.MULTIPROCESSORS, test.SHARED_BYTES[capability], capability)
        kernels = test.ModelKernels(geometry, chip, persistent=True)
        yield f"persistent of {model}'s layer", kernels.planned["persistent"].spec
        yield f"persistent of {model}'s layer, traced", kernels.persistent_traced.spec
        yield f"publish of {model}'s layer", kernels.planned["publish"].spec


def ptx(spec: Any, architecture: str) -> str:
    """PTX of a kernel, as the checkout compiles it."""
    try:
        from numba_atomflow.ops.cuda.runtime.build import make_ptx
    except ModuleNotFoundError:
        from numba_atomflow.ops.cuda.build import make_ptx
    return str(make_ptx(spec.make(), spec, CAPABILITIES[architecture]))


if __name__ == "__main__":
    sys.exit(main())
