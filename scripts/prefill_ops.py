"""The kernels of a prefill chunk on the GPU, each with its time, and the chunk as a whole.

    python scripts/prefill_ops.py --geometry llama-3.2-3b --tokens 16,512,2048
    python scripts/prefill_ops.py --geometry llama-3.1-8b --prefill fp8 --depth 4096 --json
    python scripts/prefill_ops.py --geometry llama-3.2-3b --tokens 2,4,5,8

A model with random weights. Launches of a kernel run one after the other, each with its own weights; the chunk runs as
its CUDA graph, without the LM head and what follows it; but a chunk of 2 to 4 tokens that runs in the persistent kernel
has the LM head, too.
"""

import argparse
import sys
from typing import Any

from numba_atomflow import Engine
from numba_atomflow.backends.cuda.backend import CudaBackend
from numba_atomflow.errors import AtomFlowError, OptionError
from numba_atomflow.host.machine import machine_record
from numba_atomflow.model.presets import PRESETS
from numba_atomflow.utils.json_text import json_text
from numba_atomflow.utils.tables import render


def measure(engine: Engine, tokens: int, repeats: int) -> dict[str, Any]:
    """A JSON-ready record of a chunk of so many tokens after those that the KV cache holds."""
    backend = engine.backend
    if not isinstance(backend, CudaBackend):
        raise TypeError("prefill chunks are timed on a GPU only")
    times, whole = backend.measure.time_chunk(tokens, repeats)
    kernels = [{"name": time.name, "launches": time.launches, "us": time.seconds * 1e6} for time in times]
    alone = sum(time.seconds * time.launches for time in times)
    return {"tokens": tokens, "depth": engine.position, "kernels": kernels, "alone_us": alone * 1e6, "us": whole * 1e6}


def table(record: dict[str, Any]) -> str:
    """A record for reading."""
    rows = [
        [
            kernel["name"],
            str(kernel["launches"]),
            f"{kernel['us']:.1f}",
            f"{kernel['us'] * kernel['launches']:.0f}",
            f"{kernel['us'] * kernel['launches'] / record['alone_us']:.1%}",
        ]
        for kernel in record["kernels"]
    ]
    title = f"{record['tokens']} tokens after {record['depth']}: {record['us']:.0f} us as a graph, "
    head = ["kernel", "launches", "us each", "us in all", "share"]
    return f"{title}{record['alone_us']:.0f} us one by one\n\n{render('table', head, rows)}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=list(PRESETS), default="llama-3.2-3b", metavar="NAME")
    parser.add_argument("--tokens", default="16,512,2048", metavar="N,N", help="tokens of the chunks")
    parser.add_argument("--depth", type=int, default=0, metavar="N", help="tokens in the KV cache")
    parser.add_argument("--prefill", default="gemm", choices=["gemv", "gemm", "fp8"])
    parser.add_argument("--repeats", type=int, default=9, metavar="N")
    parser.add_argument("--json", action="store_true", help="print a record")
    options = parser.parse_args()
    try:
        counts = [int(count) for count in options.tokens.split(",")]
    except ValueError:
        parser.error(f"--tokens {options.tokens} is not of the form N,N; give for example 16,512")
    if min(counts) < 1 or options.depth < 0 or options.repeats < 1:
        parser.error("--tokens and --repeats must be 1 or more, and --depth 0 or more")
    geometry, positions = PRESETS[options.geometry], options.depth + max(counts)
    records = []
    try:
        with Engine.random(geometry, "cuda", positions, prefill=options.prefill, name=options.geometry) as engine:
            device = engine.backend.device
            if options.depth:
                engine.feed([i % geometry.vocabulary for i in range(options.depth)])
            for count in counts:
                if count > engine.backend.prefill_chunk:
                    raise OptionError(
                        f"--tokens {count} is more than a chunk of --prefill {options.prefill}, which has at most "
                        f"{engine.backend.prefill_chunk} tokens; give fewer."
                    )
                records.append(measure(engine, count, options.repeats))
                if not options.json:
                    print(table(records[-1]))
    except AtomFlowError as error:
        print(f"prefill_ops: {error}", file=sys.stderr)
        return 2
    if options.json:
        machine = machine_record()
        print(json_text({"geometry": options.geometry, "device": device, "machine": machine, "chunks": records}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
