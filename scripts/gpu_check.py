"""Everything that must hold on a GPU, in one run and one table: correctness, speed, memory, start-up.

    python scripts/gpu_check.py                          # all of it, some ten minutes
    python scripts/gpu_check.py kernels speed --json out.json
    python scripts/gpu_check.py model prompts --model smollm2-135m-instruct

Sections: kernels (tests/gpu against float64), model (a real model against the CPU backend), prompts (the same on the
GEMM path, with long prompts), fp8 (FP8 activations against float16 ones, a real model's next-token distributions),
sanitizer (compute-sanitizer on a tiny model), speed (Llama geometries with random weights, against the achievable
bandwidth that the same run measures), start (cold and warm start to the first token). A section that cannot run here
says so. Exit code 1 if a target is missed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from quality import read_texts

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.backends.cuda.backend import CudaBackend
from numba_atomflow.checkpoint.arrays import WeightArrays
from numba_atomflow.checkpoint.find import DEFAULT_MODEL, find_checkpoint
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.errors import AtomFlowError
from numba_atomflow.host.machine import machine_record
from numba_atomflow.model.presets import PRESETS
from numba_atomflow.model.step import SAMPLE
from numba_atomflow.perf.perplexity import measure
from numba_atomflow.utils.json_text import json_text
from numba_atomflow.utils.tables import render
from numba_atomflow.validate import check, record

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "The three most important inventions of the twentieth century were",
    "Water boils at a temperature that depends on",
)
GREEDY_TOKENS = 256
PROMPT_REPLY, PROBED_TOKENS = 64, 300
LOGITS_LIMIT = 2e-3  # relative L2 against the CPU backend
KL_LIMITS = 0.005, 0.03  # of FP8 activations against float16 ones; emulated on the CPU: 0.019 (docs/quality.md)
SHARE_TARGETS = {"llama-3.2-3b": 0.50, "llama-3.1-8b": 0.60}  # of what TMA bulk copies reach
CONTEXTS = (16, 4096)
OVERHEAD_TARGET = 64 << 20  # bytes of device memory beyond weights and KV cache
HANGING = 400  # seconds of a test, after which its process ends: a kernel that hangs cannot be stopped
COLD_TARGET, WARM_TARGET = 60.0, 2.0  # seconds to the first token


@dataclass
class Row:
    """A line of the table. `passed` is None without a target, or where nothing could be run."""

    section: str
    what: str
    figure: str
    target: str = ""
    passed: bool | None = None


class Report:
    """Rows as they come, shown at once."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(self, section: str, what: str, figure: str, target: str = "", passed: bool | None = None) -> None:
        self.rows.append(Row(section, what, figure, target, passed))
        verdict = {True: "ok  ", False: "MISS", None: "    "}[passed]
        print(f"{verdict} {section}: {what}: {figure}" + (f" (target: {target})" if target else ""), flush=True)


# --- kernels ---------------------------------------------------------------------------------------------------------


def check_kernels(report: Report, options: argparse.Namespace) -> None:
    """tests/gpu, with the worst error of each family of kernels."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
        command += ["-o", f"faulthandler_timeout={HANGING}", "-o", "faulthandler_exit_on_timeout=true"]
        if find_spec("xdist"):  # most of the time goes into compiling, which other cores can share
            command += ["-n", str(min(14, os.cpu_count() or 1)), "--dist", "worksteal", "-p", "no:benchmark"]
        environment = os.environ | {"ATOMFLOW_FIGURES": str(figures)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        (options.logs / "tests-gpu.log").write_text(done.stdout + done.stderr)
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        report.add("kernels", "tests/gpu", last, "all pass", done.returncode == 0)
        worst: dict[str, tuple[float, float]] = {}
        for line in figures.read_text().splitlines() if figures.exists() else ():
            entry = json.loads(line)
            largest = worst.get(entry["family"], (0.0, 1.0))
            if entry["error"] / entry["limit"] >= largest[0] / largest[1]:
                worst[entry["family"]] = entry["error"], entry["limit"]
        for family, (error, limit) in worst.items():
            figure = f"relative L2 {error:.2e}, {error / limit:.0%} of the tolerance"
            report.add("kernels", f"{family}, worst", figure, f"{limit:.1e}", error <= limit)


# --- a real model ----------------------------------------------------------------------------------------------------


def check_model(report: Report, options: argparse.Namespace) -> None:
    """Logits and greedy tokens of both backends."""
    try:
        path = find_checkpoint(options.model)
    except AtomFlowError as error:
        report.add("model", options.model, f"not run: {error}")
        return
    with Engine.load(path, "cuda", 512) as gpu, Engine.load(path, "cpu", 512) as cpu:
        _compare(report, "model", gpu, cpu, [gpu.text.encode(prompt) for prompt in PROMPTS], GREEDY_TOKENS)
        reply = gpu.generate(PROMPTS[0], SamplingParams(max_tokens=GREEDY_TOKENS, ignore_eos=True)).finish()
        report.add("model", "speed", f"{reply.stats.tokens_per_second:.0f} tok/s, TTFT {reply.stats.ttft * 1e3:.1f} ms")
        print(f"     text: {reply.text[:100]!r}", flush=True)


def _compare(
    report: Report, section: str, gpu: Engine, cpu: Engine, prompts: Sequence[Sequence[int]], count: int
) -> None:
    """Greedy replies of `count` tokens, and logits of every position of prompt and reply."""
    greedy = SamplingParams(max_tokens=count, ignore_eos=True)
    same, errors, splits = [], [], []
    for tokens in prompts:
        replies = [engine.generate_tokens(tokens, greedy).finish().token_ids for engine in (gpu, cpu)]
        first = next((i for i, (a, b) in enumerate(zip(*replies, strict=True)) if a != b), count)
        same.append(first)
        logits = []
        for engine in (gpu, cpu):
            engine.reset()
            logits.append(engine.feed([*tokens, *replies[1]], all_logits=True).astype(np.float64))
        errors.append(float(np.linalg.norm(logits[0] - logits[1]) / np.linalg.norm(logits[1])))
        if first < count:
            row = len(tokens) - 1 + first
            best = np.argsort(logits[1][row])[-2:]
            margin = float(np.diff(logits[1][row][best])[0])
            moved = abs(float(np.diff((logits[0] - logits[1])[row][best])[0]))
            splits.append(f"token {first}: the CPU's two best are {margin:.4f} apart, the GPU moves them {moved:.4f}")
    report.add(section, "greedy tokens as on the CPU", str(same), f"{count} each", min(same) == count)
    for split in splits:
        report.add(section, "where they part", split)
    figure = f"relative L2 {max(errors):.2e}"
    report.add(section, "logits against the CPU", figure, f"{LOGITS_LIMIT}", max(errors) <= LOGITS_LIMIT)


# --- prompts ---------------------------------------------------------------------------------------------------------


def check_prompts(report: Report, options: argparse.Namespace) -> None:
    """A real model on the GEMM path: long prompts against the CPU, and every probe of chunks."""
    try:
        path = find_checkpoint(options.model)
    except AtomFlowError as error:
        report.add("prompts", options.model, f"not run: {error}")
        return
    text = (ROOT / "docs" / "cuda-backend.md").read_text()
    with Engine.load(path, "cpu", 1024) as cpu, Engine.load(path, "cuda", 1024, prefill="gemm") as gpu:
        tokens = gpu.text.encode(text)
        _compare(report, "prompts", gpu, cpu, [tokens[start : start + 700] for start in (0, 700)], PROMPT_REPLY)
        _compare(report, "prompts", gpu, cpu, [tokens[:length] for length in (9, 17, 65, 129)], PROMPT_REPLY)
        reference = record(cpu.backend, cpu.geometry, tokens[:PROBED_TOKENS], 4)
        for what, isolate, block in (("one chunk", False, None), ("isolated", True, None), ("chunks of 50", False, 50)):
            outcome = check(gpu.backend, reference, isolate=isolate, block=block)
            report.add("prompts", f"probes against the CPU, {what}", outcome.verdict(), "PASS", outcome.passed)


# --- FP8 activations -------------------------------------------------------------------------------------------------


def check_fp8(report: Report, options: argparse.Namespace) -> None:
    """Next-token distributions with FP8 activations against those of the GEMM path, on Python's license."""
    window = 512
    try:
        path = find_checkpoint(options.model)
        fp8 = Engine.load(path, "cuda", window, prefill="fp8")
    except AtomFlowError as error:
        report.add("fp8", options.model, f"not run: {error}")
        return
    with fp8, Engine.load(path, "cuda", window, prefill="gemm") as exact:

        def logits(tokens: Sequence[int]) -> NDArray[np.float32]:
            exact.reset()
            return exact.feed(tokens, all_logits=True)

        result = measure(fp8, read_texts()["license"], window, window * 3 // 4, logits)
    other, (least, most) = result.divergence, KL_LIMITS
    assert other is not None
    figure = f"{other.mean_kl:.4f}, top-1 {other.top1:.1%}"
    report.add("fp8", "mean KL, float16 activations", figure, f"{least} to {most}", least <= other.mean_kl <= most)
    report.add("fp8", "perplexity, float16 activations", f"{result.perplexity / other.reference_perplexity - 1:+.2%}")


# --- sanitizer -------------------------------------------------------------------------------------------------------


def check_sanitizer(report: Report, options: argparse.Namespace) -> None:
    """memcheck, racecheck and synccheck over prompts and decoding of a tiny model; racecheck without the persistent
    kernel, whose CTAs poll for each other.
    """
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        report.add("sanitizer", "compute-sanitizer", "not run: it is not installed (it comes with the CUDA toolkit)")
        return
    program = ROOT / "tests" / "gpu" / "tiny_run.py"
    subprocess.run([sys.executable, program], cwd=ROOT, check=True, capture_output=True)  # compiles, unobserved
    for name in ("memcheck", "racecheck", "synccheck"):
        decode = ["graph"] if name == "racecheck" else []
        command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, str(program), *decode]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        (options.logs / f"{name}.log").write_text(done.stdout + done.stderr)
        summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line] or [done.stderr[-200:]]
        report.add("sanitizer", name, summary[-1].strip("= "), "no error", done.returncode == 0)


# --- speed -----------------------------------------------------------------------------------------------------------


def check_speed(report: Report, options: argparse.Namespace) -> None:
    """Greedy decoding of large geometries, all host work included; the share of achievable bandwidth; memory."""
    for name in options.geometries:
        geometry = PRESETS[name]
        model = RandomModel(geometry, name=name)
        started = time.perf_counter()
        with Engine.random(geometry, "cuda", max(CONTEXTS) + GREEDY_TOKENS + 8, name=name) as engine:
            report.add("speed", f"{name}, loading", f"{time.perf_counter() - started:.1f} s")
            backend = engine.backend
            ceilings = backend.measure.ceilings()
            figures = ", ".join(f"{way} {speed:.0f} GB/s" for way, speed in ceilings.items())
            report.add("speed", f"{name}, ceilings", figures)
            ceiling = ceilings.get("TMA", max(ceilings.values()))
            for context in CONTEXTS:
                _decode_speed(report, engine, name, context, ceilings, ceiling)
            replayed = _seconds_per_token(engine, 16, 64)
            graph = backend.measure.time_step(20)
        eager = CudaBackend(geometry, WeightArrays(model), 512, graphs=False)
        eager.prepare(None)
        with Engine(model, eager, 512) as engine:
            launched = _seconds_per_token(engine, 16, 64)
        times = f"{launched * 1e3:.3f} ms a token against {replayed * 1e3:.3f}, of which the graph {graph * 1e3:.3f}"
        figure = f"{launched / replayed:.2f}x ({times})"
        report.add("speed", f"{name}, eager against replay", figure)
        _memory(report, name)


def _seconds_per_token(engine: Engine, context: int, count: int) -> float:
    prompt = np.random.default_rng(0).integers(0, engine.geometry.vocabulary, context).tolist()
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    return min(engine.generate_tokens(prompt, params).finish().stats.tpot for _ in range(3))


def _decode_speed(
    report: Report, engine: Engine, name: str, context: int, ceilings: dict[str, float], ceiling: float
) -> None:
    prompt = np.random.default_rng(context).integers(0, engine.geometry.vocabulary, context).tolist()
    params = SamplingParams(max_tokens=GREEDY_TOKENS, ignore_eos=True)
    replies = []
    for _ in range(4):
        engine.reset()
        replies.append(engine.generate_tokens(prompt, params).finish().stats)
    del replies[0]
    tpots = [stats.tpot for stats in replies]
    tpot = float(np.median(tpots))
    length = context + GREEDY_TOKENS // 2
    cache = sum(op.cache_bytes(length) for op in engine.backend.step(1, SAMPLE))
    speed = (engine.weight_bytes_per_token + cache) / tpot / 1e9
    shares = ", ".join(f"{speed / value:.1%} of {way}" for way, value in ceilings.items())
    spread = f"{1 / max(tpots):.0f}-{1 / min(tpots):.0f}"
    figure = f"{1 / tpot:.0f} tok/s ({spread}), TPOT {tpot * 1e3:.3f} ms, {speed:.0f} GB/s: {shares}"
    target = SHARE_TARGETS.get(name)
    passed = None if target is None else speed / ceiling >= target
    report.add("speed", f"{name}, {GREEDY_TOKENS} after {context}", figure, f"{target:.0%}" if target else "", passed)
    ttft = float(np.median([stats.ttft for stats in replies]))
    report.add("speed", f"{name}, prompt of {context}", f"TTFT {ttft * 1e3:.1f} ms, {context / ttft:.0f} tok/s")


def _memory(report: Report, name: str) -> None:
    """What 2,048 positions take on the device, by the driver's own count, without room for chunks of the GEMM path."""
    from numba_atomflow.device.resources import DeviceResources

    with DeviceResources() as owner:
        device = owner.open()
        free = device.free_bytes()
        with Engine.random(PRESETS[name], "cuda", 2048, prefill="gemv", name=name) as engine:
            used = free - device.free_bytes()
            pools = engine.backend.plan.pool_bytes()
            model_bytes = pools["weights"] + pools["kv cache"]
    figure = f"{used / 1e9:.3f} GB, of which weights and KV cache {model_bytes / 1e9:.3f}"
    report.add(
        "speed", f"{name}, VRAM at 2,048 positions", figure, "those + 64 MB", used - model_bytes <= OVERHEAD_TARGET
    )


# --- start -----------------------------------------------------------------------------------------------------------


def check_start(report: Report, options: argparse.Namespace) -> None:
    """From starting Python to the first text, with nothing compiled and with everything compiled."""
    try:
        path = find_checkpoint(options.model)
    except AtomFlowError as error:
        report.add("start", options.model, f"not run: {error}")
        return
    with tempfile.TemporaryDirectory() as home:
        for what, target in (("cold", COLD_TARGET), ("warm", WARM_TARGET), ("warm again", WARM_TARGET)):
            program = "import sys; from numba_atomflow.cli import main; sys.exit(main())"
            command = [sys.executable, "-c", program, "generate", PROMPTS[0]]
            command += ["--model", str(path), "--max-tokens", "4", "--backend", "cuda"]
            environment = os.environ | {"NUMBA_ATOMFLOW_HOME": home, "PYTHONUNBUFFERED": "1"}
            started = time.perf_counter()
            pipe = subprocess.PIPE
            with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe) as run:
                first = run.stdout.read(1) if run.stdout else b""
                seconds = time.perf_counter() - started
                _, messages = run.communicate()
            (options.logs / f"start-{what.replace(' ', '-')}.log").write_bytes(messages)
            figure = f"{seconds:.2f} s to the first text" if first else "no text came"
            report.add("start", what, figure, f"{target:.0f} s", bool(first) and seconds <= target)


SECTIONS: dict[str, Callable[[Report, argparse.Namespace], None]] = {
    "kernels": check_kernels,
    "model": check_model,
    "prompts": check_prompts,
    "fp8": check_fp8,
    "sanitizer": check_sanitizer,
    "speed": check_speed,
    "start": check_start,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"what to run, of {', '.join(SECTIONS)}; everything by default")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="a checkpoint, for the sections model, prompts, fp8 and start"
    )
    parser.add_argument("--geometries", nargs="+", default=list(SHARE_TARGETS), choices=list(PRESETS), metavar="NAME")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    logs = Path(tempfile.gettempdir())
    parser.add_argument("--logs", type=Path, default=logs, help="folder for the logs of other tools")
    options = parser.parse_args()
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"there is no section {unknown.pop()!r}; choose of {', '.join(SECTIONS)}")
    options.logs.mkdir(parents=True, exist_ok=True)
    report, started = Report(), time.perf_counter()
    try:
        for name in options.sections or SECTIONS:
            SECTIONS[name](report, options)
    except AtomFlowError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    verdicts = {True: "met", False: "**missed**", None: ""}
    table = [[row.section, row.what, row.figure, row.target, verdicts[row.passed]] for row in report.rows]
    print("\n" + render("md", ["section", "what", "figure", "target", "verdict"], table))
    print(f"{time.perf_counter() - started:.0f} s in all")
    if options.json:
        record = {"machine": machine_record(), "rows": [asdict(row) for row in report.rows]}
        options.json.write_text(json_text(record, indent=1))
    return 1 if any(row.passed is False for row in report.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
