"""One GPU against several that share a model: the same bits, seconds of a decode step, and NCCL beside it.

    python scripts/bench_gpus.py                                        # 3B on 2 GPUs
    python scripts/bench_gpus.py --geometry llama-3.1-8b --gpus 4 --depths 16,8192
    python scripts/bench_gpus.py --geometry llama-3.3-70b --gpus 2      # if one GPU can hold it; else --no-single
    python scripts/bench_gpus.py --nccl                                 # and what its all-reduces alone would take
    python scripts/bench_gpus.py --gpus 0,0 --layers 4                  # two ranks on one GPU: no speed, but all checks

Weights are random. Each engine generates from a prompt of one token, greedily, 300 tokens at the most; the tokens must
be the same, and the keys, values and logits of 32 steps, as `validate --diff-gpus` compares them (exit code 1 if they
are not). Steps are timed at each depth, of one token and of several that are verified, and a prompt of 512 tokens;
first of one GPU, then of several: the engines may not fit side by side. `--nccl` needs torch and a process per GPU:
all-reduces of one token's residual stream, two for each layer, in a captured graph.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
from number_lists import list_of

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.errors import AtomFlowError, BackendError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.host.machine import machine_record
from numba_atomflow.model.presets import PRESETS
from numba_atomflow.utils.json_text import json_text
from numba_atomflow.validate import StepBits, compare_gpus, record_steps

Gpus = int | list[int]
PROMPT = 512  # tokens that are timed; fewer where the KV cache ends
STEPS = 31  # after a prompt of one token, whose bits are compared
NCCL_SECONDS = 120  # until all-reduces must have ended


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


def wide_step_seconds(engine: Engine, depths: Sequence[int], repeats: int) -> dict[int, dict[int, float]]:
    """The same of steps that verify, by the number of their tokens; those of one GPU without the host's part."""
    seconds = {}
    for depth in depths:
        engine.backend.seek(depth)
        seconds[depth] = engine.backend.time_widths(repeats)
    engine.backend.seek(0)
    engine.reset()
    return seconds


def prompt_seconds(engine: Engine, repeats: int) -> tuple[int, float]:
    """Tokens of a prompt, and the median seconds until it has the logits of its last."""
    prompt, seconds = [17] * min(PROMPT, engine.max_seq_len), []
    for _ in range(repeats + 1):
        engine.reset()
        begun = time.perf_counter()
        engine.feed(prompt)
        seconds.append(time.perf_counter() - begun)
    engine.reset()
    return len(prompt), float(np.median(seconds[1:]))


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
            prompt_tokens, seconds = prompt_seconds(engine, repeats)
            record["engines"][name] = {
                "load_seconds": engine.load_seconds,
                "gigabytes_per_gpu": engine.backend.plan.total / 1e9,
                "step_microseconds": {d: s * 1e6 for d, s in step_seconds(engine, depths, repeats).items()},
                "wide_step_microseconds": {
                    depth: {width: taken * 1e6 for width, taken in by_width.items()}
                    for depth, by_width in wide_step_seconds(engine, depths, repeats).items()
                },
                "prompt_tokens": prompt_tokens,
                "prompt_milliseconds": seconds * 1e3,
            }
    return record


def nccl_microseconds(ordinals: Sequence[int], hidden: int, operations: int) -> float:
    """All-reduces of a float16 vector in a graph, on these GPUs: median microseconds of all `operations` together."""
    import torch.multiprocessing as processes

    queue = processes.get_context("spawn").Queue()
    workers = processes.spawn(
        _all_reduce, (tuple(ordinals), hidden, operations, queue), len(ordinals), join=False, daemon=True
    )
    started = time.monotonic()
    try:
        while not workers.join(timeout=1):  # raises what a process has raised
            if time.monotonic() - started > NCCL_SECONDS:
                raise BackendError(f"NCCL's all-reduces did not end in {NCCL_SECONDS} s; try NCCL_DEBUG=INFO.")
    finally:
        for process in workers.processes:
            process.kill()
    return float(queue.get(timeout=1))


def _all_reduce(rank: int, ordinals: tuple[int, ...], hidden: int, operations: int, queue: Any) -> None:
    import torch
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "NCCL_GRAPH_MIXING_SUPPORT": "0"}
    device = torch.device("cuda", ordinals[rank])
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", rank=rank, world_size=len(ordinals), device_id=device)
    vector = torch.zeros(hidden, dtype=torch.float16, device=device)
    dist.all_reduce(vector)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog thread calls the driver, too
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
    graph.reset()  # a communicator is not destroyed before the graphs that use it
    dist.destroy_process_group()


def show(record: dict[str, Any]) -> None:
    engines = record["engines"]
    for name, found in engines.items():
        print(f"{name:<8} {found['gigabytes_per_gpu']:7.2f} GB per GPU, loaded in {found['load_seconds']:.1f} s")
        for depth, microseconds in found["step_microseconds"].items():
            ratio = engines["one"]["step_microseconds"][depth] / microseconds if "one" in engines else 1.0
            print(f"  after {depth:>6} tokens {microseconds:9.1f} us, {1e6 / microseconds:7.1f} tok/s, x{ratio:.2f}")
            wide = found["wide_step_microseconds"][depth]
            print("    verified:", ", ".join(f"{width}: {taken:.1f} us" for width, taken in wide.items()))
        print(f"  a prompt of {found['prompt_tokens']} tokens: {found['prompt_milliseconds']:.1f} ms")
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
    if min(args.gpus) < 0 or args.gpus == [0]:
        parser.error("--gpus must be a number from 1 on, or the numbers of GPUs, from 0 on, with commas")
    if args.nccl and find_spec("torch") is None:
        parser.error("--nccl needs torch: pip install torch")
    if args.nccl and len(set(args.gpus)) < len(args.gpus):
        parser.error("--nccl takes a GPU for each process: name each once")
    if args.layers:
        geometry = replace(geometry, layers=args.layers)
    gpus: Gpus = args.gpus if len(args.gpus) > 1 else args.gpus[0]
    try:
        record = compare(geometry, gpus, args.depths, args.repeats, single=not args.no_single)
        if args.nccl:
            ordinals = range(gpus) if isinstance(gpus, int) else gpus
            record["nccl_microseconds"] = nccl_microseconds(ordinals, geometry.hidden, 2 * geometry.layers)
    except AtomFlowError as error:
        print(error, file=sys.stderr)
        return 2
    if args.json:
        print(json_text(record | {"geometry": args.geometry, "machine": machine_record()}))
    else:
        show(record)
    return 0 if record["bits"] is None or (record["same_tokens"] and record["bits"]["passed"]) else 1


if __name__ == "__main__":
    sys.exit(main())
