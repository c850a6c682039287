"""How fast the GPU's memory can be read."""

from typing import Any

import numpy as np

from numba_atomflow.device.driver import Device, call
from numba_atomflow.device.resources import Resources
from numba_atomflow.errors import BackendError
from numba_atomflow.memory.view import View
from numba_atomflow.ops.cuda.runtime import bandwidth
from numba_atomflow.ops.cuda.runtime.build import build
from numba_atomflow.ops.cuda.runtime.chip import chip_of
from numba_atomflow.ops.cuda.runtime.graph import Graph, time_graph
from numba_atomflow.ops.cuda.runtime.launch import Kernel, Launch
from numba_atomflow.ops.cuda.runtime.spec import U32, kernel_spec

_CEILING_BYTES = 2 << 30  # read per pass: far more than any second-level cache holds
_LEAST_CACHES = 4  # second-level caches that it must be larger than
_CEILING_PASSES = 12
_READ_BLOCKS = 4  # per SM


def measure_ceilings(device: Device, stream: Any, made: Resources) -> dict[str, float]:
    """GB/s (medians) of reading memory: by loads, and by TMA bulk copies where the GPU has them.

    Takes 2 GB of device memory for as long as it runs, or half of what is free if that is less.

    Args:
        made: owns that memory while it is needed.

    Raises:
        BackendError: what is free is too little to be slower than L2.
    """
    chip = chip_of(device)
    free = int(call("cuMemGetInfo")[0])
    room = min(_CEILING_BYTES, free // 2) // (1 << 20) * (1 << 20)
    if room < _LEAST_CACHES * device.l2_bytes:
        needed = 2 * _LEAST_CACHES * device.l2_bytes
        raise BackendError(
            f"Measuring how fast the GPU's memory is takes {needed / 1e6:.0f} MB, but only {free / 1e6:.0f} MB "
            "are free; use a smaller --max-seq-len, or close other programs."
        )
    specs = {"loads": kernel_spec("read", bandwidth.make_read, (U32, U32), bandwidth.THREADS)}
    blocks = {"loads": _READ_BLOCKS * chip.sms, "TMA": chip.sms}
    if chip.capability >= (9, 0):
        shared = bandwidth.bulk_shared_bytes()
        specs["TMA"] = kernel_spec("bulk_read", bandwidth.make_bulk_read, (U32, U32), 32, shared)
    codes = build(list(specs.values()), chip.capability)
    found = {}
    with made.scope(stream) as measuring:
        address = int(measuring.call("cuMemAlloc", room, undo="cuMemFree"))
        call("cuMemsetD32Async", address, 0x3C5A96E1, room // 4, stream)
        source = View("ceiling.source", address, (room // 4 - 1024,), "uint32")
        total = View("ceiling.total", address + room - 4096, (1,), "uint32")
        for name, spec in specs.items():
            kernel = Kernel(spec, codes[spec], measuring)
            graph = Graph([Launch(kernel, blocks[name], (source, total), stream)], stream, measuring)
            found[name] = source.nbytes / float(np.median(time_graph(graph, _CEILING_PASSES))) / 1e9
    return found
