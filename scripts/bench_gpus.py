"""One GPU against several that share a model: the same bits, seconds of a decode step, and NCCL beside it.

    python scripts/bench_gpus.py                                        # 3B on 2 GPUs
    python scripts/bench_gpus.py --geometry llama-3.1-8b --gpus 4 --depths 16,8192
    python scripts/bench_gpus.py --geometry llama-3.3-70b --gpus 2      # if one GPU can hold it; else --no-single
    python scripts/bench_gpus.py --nccl                                 # and what its all-reduces alone would take
    python scripts/bench_gpus.py --gpus 0,0 --layers 4                  # two ranks on one GPU: no speed, but all checks

Weights are random. Each engine generates from a prompt of one token, greedily, 300 tokens at the most; the tokens must
be the same, and the keys, values and logits of 32 steps, as `validate --diff-gpus` compares them (exit code 1 if they
are not). Steps are timed at each depth, first of one GPU, then of several: the engines may not
fit side by side. `--nccl` needs torch and a process per GPU: all-reduces of one token's residual stream, two for each
layer, in a captured graph.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from number_lists import list_of

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.errors import AtomFlowError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.host.machine import machine_record
from numba_atomflow.model.presets import PRESETS
from numba_atomflow.utils.json_text import json_text
from numba_atomflow.validate import StepBits, compare_gpus, record_steps

Gpus = int | list[int]
STEPS = 31  # after a prompt of one token, whose bits are compared


def generated(engine: Engine, count: int) -> list[int]:
    """So many tokens after a prompt of one."""
    engine.reset()
    return engine.generate_tokens([17], SamplingParams(max_tokens=count, ignore_eos=True)).finish().token_ids


def step_seconds(engine: Engine, depths: Sequence[int], repeats: int) -> dict[int, float]:
    """Median seconds of a decode step at each position of the KV cache."""
    seconds = {}
    for depth in depths:
        engine.backend.seek(depth)
        seconds[depth] = engine.backend.measure.time_step(repeats)
    engine.backend.seek(0)
    engine.reset()
    return seconds


def compare(
    geometry: ModelGeometry, gpus: Gpus, depths: Sequence[int], repeats: int, *, single: bool
) -> dict[str, Any]:
    """Tokens, step times, loading times and memory of one GPU and of several."""
    positions, count = max(depths) + 64, min(max(depths) + 1, 300)
    record: dict[str, Any] = {"device": "", "same_tokens": None, "bits": None, "engines": {}}
    expected: tuple[list[int], StepBits] | None = None
    engines: dict[str, Gpus] = ({"one": 1} if single else {}) | {"several": gpus}
    for name, which in engines.items():
        with Engine.random(geometry, "cuda", positions, gpus=which) as engine:
            tokens, bits = generated(engine, count), record_steps(engine.backend, geometry, [17], STEPS)
            engine.reset()
            if expected is not None:
                record["same_tokens"], record["bits"] = tokens == expected[0], compare_gpus(expected[1], bits).to_dict()
            expected = tokens, bits
            record["device"] = engine.backend.device
            record["engines"][name] = {
                "load_seconds": engine.load_seconds,
                "gigabytes_per_gpu": engine.backend.plan.total / 1e9,
                "step_microseconds": {d: s * 1e6 for d, s in step_seconds(engine, depths, repeats).items()},
            }
    return record


def nccl_microseconds(gpus: int, hidden: int, operations: int) -> float:
    """All-reduces of a float16 vector in a graph, on so many GPUs: median microseconds of all `operations` together."""
    import torch.multiprocessing as processes

    context = processes.get_context("spawn")
    queue = context.SimpleQueue()
    processes.spawn(_all_reduce, (gpus, hidden, operations, queue), gpus)
    return float(queue.get())


def _all_reduce(rank: int, gpus: int, hidden: int, operations: int, queue: Any) -> None:
    import torch
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "NCCL_GRAPH_MIXING_SUPPORT": "0"}
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=gpus)
    vector = torch.zeros(hidden, dtype=torch.float16, device="cuda")
    dist.all_reduce(vector)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(operations):
            dist.all_reduce(vector)
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    if rank == 0:
        queue.put(float(np.median(times[2:])))
    dist.destroy_process_group()


def show(record: dict[str, Any]) -> None:
    engines = record["engines"]
    for name, found in engines.items():
        print(f"{name:<8} {found['gigabytes_per_gpu']:7.2f} GB per GPU, loaded in {found['load_seconds']:.1f} s")
        for depth, microseconds in found["step_microseconds"].items():
            ratio = engines["one"]["step_microseconds"][depth] / microseconds if "one" in engines else 1.0
            print(f"  after {depth:>6} tokens {microseconds:9.1f} us, {1e6 / microseconds:7.1f} tok/s, x{ratio:.2f}")
    if record["same_tokens"] is not None:
        print("the same tokens" if record["same_tokens"] else "OTHER TOKENS")
        print(record["bits"]["verdict"])
    if "nccl_microseconds" in record:
        print(f"NCCL: {record['nccl_microseconds']:.0f} us for two all-reduces in each layer")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=list(PRESETS), default="llama-3.2-3b", metavar="NAME")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--gpus", type=list_of(int, "0,1"), default=[2], help="how many, or their numbers, with commas")
    parser.add_argument(
        "--depths", type=list_of(int, "16,8192"), default=[16, 8192], help="positions of the KV cache, with commas"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-single", action="store_true", help="several GPUs only")
    parser.add_argument("--nccl", action="store_true", help="time NCCL's all-reduces too")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    geometry = PRESETS[args.geometry]
    if min(args.depths) < 0 or args.repeats < 1 or (args.layers is not None and args.layers < 1):
        parser.error("--depths must be 0 or more, and --repeats and --layers 1 or more")
    if args.layers:
        geometry = replace(geometry, layers=args.layers)
    gpus: Gpus = args.gpus if len(args.gpus) > 1 else args.gpus[0]
    try:
        record = compare(geometry, gpus, args.depths, args.repeats, single=not args.no_single)
    except AtomFlowError as error:
        print(error, file=sys.stderr)
        return 2
    if args.nccl:
        ranks = gpus if isinstance(gpus, int) else len(gpus)
        record["nccl_microseconds"] = nccl_microseconds(ranks, geometry.hidden, 2 * geometry.layers)
    if args.json:
        print(json_text(record | {"geometry": args.geometry, "machine": machine_record()}))
    else:
        show(record)
    return 0 if record["bits"] is None or (record["same_tokens"] and record["bits"]["passed"]) else 1


if __name__ == "__main__":
    sys.exit(main())
