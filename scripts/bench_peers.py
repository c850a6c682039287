"""Our engine and others, one after another, on the same geometry, prompt and number of tokens.

    python scripts/bench_peers.py --geometry llama-3.2-3b
    python scripts/bench_peers.py --geometry llama-3.2-3b -p 2048 --prefill gemm
    python scripts/bench_peers.py --geometry llama-3.1-8b --llama-bench ~/llama.cpp/build/bin/llama-bench --format md
    python scripts/bench_peers.py --geometry smollm2-135m --device cpu --peers transformers
    python scripts/bench_peers.py --geometry smollm2-135m --device cpu --peers llama.cpp --llama-bench PATH \
        --threads 2 --rounds 5 -r 2 -p 512 -n 64

Every installed peer runs in a process of its own, with random weights; the table says which are missing. All figures
are of this run. Ratios are this engine's speed over the peer's, of decoding and of the prompt: above 1, this engine is
faster. With --rounds, peers take turns, so that other load on the machine affects all alike. Each peer runs in its
fastest usual setup and its own weight format: BF16, FP8, or Q8_0 for llama.cpp. llama-bench is part of llama.cpp's
releases (github.com/ggml-org/llama.cpp), of the package llama.cpp of conda-forge, and of Homebrew's.

Memory is the most that an engine's process holds, mapped files included, and in brackets what is not of mapped files.
On a CPU both this engine and llama.cpp map their weights.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).with_name("peers")))
from protocol import Answer, Task

from numba_atomflow import AtomFlowError
from numba_atomflow.backends.base import Prefill
from numba_atomflow.host.machine import machine_record
from numba_atomflow.model.presets import PRESETS, find_preset
from numba_atomflow.utils.json_text import json_text
from numba_atomflow.utils.stats import Spread
from numba_atomflow.utils.tables import render

PEERS = Path(__file__).with_name("peers")
OURS = "numba-atomflow"


@dataclass(frozen=True)
class Peer:
    """An engine to compare with.

    Attributes:
        name: in the table, and for --peers.
        script: in scripts/peers.
        modules: packages that must be installed.
        advice: how to install it.
    """

    name: str
    script: str
    modules: tuple[str, ...] = ()
    advice: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def missing(self) -> str | None:
        """Why it cannot run, or None."""
        absent = [module for module in self.modules if find_spec(module) is None]
        if absent:
            return f"{', '.join(absent)} not installed; {self.advice}"
        return None


@dataclass(frozen=True)
class LlamaCpp(Peer):
    """A program, not a package."""

    def missing(self) -> str | None:
        binary = self.options["binary"]
        if binary is None:
            return "give --llama-bench PATH"
        if not shutil.which(binary):
            return f"{binary} is no program; give --llama-bench PATH"
        return super().missing()


def all_peers(llama_bench: str | None, prefill: Prefill = "auto") -> list[Peer]:
    """Our engine first. `prefill`: how it takes prompts."""
    vllm = ("vllm_engine.py", ("vllm",), "pip install vllm")
    return [
        Peer(OURS, "this_engine.py", options={"prefill": prefill}),
        Peer("transformers", "hf_transformers.py", ("torch", "transformers"), "pip install torch transformers"),
        Peer("vllm-bf16", *vllm),
        Peer("vllm-fp8", *vllm, options={"quantization": "fp8"}),
        LlamaCpp("llama.cpp", "llama_bench.py", ("gguf",), "pip install gguf", {"binary": llama_bench}),
    ]


@dataclass(frozen=True)
class Outcome:
    """A peer's figures, or why there are none."""

    peer: str
    answer: Answer | None
    problem: str = ""


def run_peer(peer: Peer, task: Task) -> Outcome:
    """Run a peer in a process of its own, if it can run."""
    problem = peer.missing()
    if problem:
        return Outcome(peer.name, None, f"missing: {problem}")
    with_options = Task(**vars(task) | {"options": peer.options})
    command = [sys.executable, str(PEERS / peer.script), with_options.to_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        return Outcome(peer.name, None, f"failed: {said}")
    return Outcome(peer.name, Answer(**json.loads(lines[-1])))


def run_all(peers: Sequence[Peer], task: Task, tell: Callable[[str], None], rounds: int = 1) -> list[Outcome]:
    """One after another, `rounds` times; a peer that failed once is not run again."""
    outcomes: list[Outcome | None] = [None] * len(peers)
    for turn in range(rounds):
        for i, (peer, before) in enumerate(zip(peers, outcomes, strict=True)):
            if before is None or before.answer:
                tell(f"[{turn * len(peers) + i + 1}/{rounds * len(peers)}] {peer.name}")
                now = run_peer(peer, task)
                outcomes[i] = joined(before, now) if before else now
    return [outcome for outcome in outcomes if outcome is not None]


def joined(before: Outcome, now: Outcome) -> Outcome:
    """The turns of two rounds of a peer, or the second's problem."""
    if before.answer is None or now.answer is None:
        return now
    first, second = before.answer, now.answer
    larger = max(first, second, key=lambda answer: answer.memory or 0)
    turns = first.ttft + second.ttft, first.tpot + second.tpot
    return replace(now, answer=Answer(second.what, *turns, larger.memory, larger.private))


def record_of(outcomes: Sequence[Outcome], task: Task, name: str, rounds: int = 1) -> dict[str, Any]:
    """A JSON-ready record."""
    ours = next((outcome.answer for outcome in outcomes if outcome.peer == OURS), None)
    rows = []
    for outcome in outcomes:
        row: dict[str, Any] = {"peer": outcome.peer, "problem": outcome.problem or None}
        if outcome.answer:
            speed = Spread.of([1 / tpot for tpot in outcome.answer.tpot])
            row |= {
                "what": outcome.answer.what,
                "decode_tokens_per_second": speed.to_dict(),
                "ttft_seconds": Spread.of(outcome.answer.ttft).to_dict(),
                "peak_memory_bytes": outcome.answer.memory,
                "private_memory_bytes": outcome.answer.private,
            }
            if ours:
                row["ratio"] = Spread.of([1 / tpot for tpot in ours.tpot]).ratio_to(speed).to_dict()
                row["prompt_ratio"] = Spread.of(outcome.answer.ttft).ratio_to(Spread.of(ours.ttft)).to_dict()
        rows.append(row)
    return {
        "geometry": name,
        "prompt_tokens": task.prompt_tokens,
        "decode_tokens": task.decode_tokens,
        "repeats": task.repeats,
        "rounds": rounds,
        "threads": task.threads,
        "device": task.device,
        "machine": machine_record(),
        "peers": rows,
    }


def report(record: dict[str, Any], style: str) -> str:
    """A table with a line about the run above it."""

    def cells(row: dict[str, Any]) -> list[str]:
        if row["problem"]:
            return [row["peer"], *"-----", row["problem"]]
        speed, ttft = (Spread.from_dict(row[name]) for name in ("decode_tokens_per_second", "ttft_seconds"))
        ratios = [Spread.from_dict(row[name]).text(2) if name in row else "-" for name in ("ratio", "prompt_ratio")]
        memory = "-" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e6:.0f}"
        if row["private_memory_bytes"] is not None:
            memory += f" ({row['private_memory_bytes'] / 1e6:.0f})"
        return [row["peer"], speed.text(1), ttft.text(1, 1e3), *ratios, memory, row["what"]]

    machine = record["machine"]
    driver = f", NVIDIA driver {machine['nvidia_driver']}" if machine["nvidia_driver"] else ""
    turns = f"{record['repeats'] * record['rounds']} turns"
    if record["threads"]:
        turns += f" on {record['threads']} threads"
    head = (
        f"{record['geometry']}, random weights: a prompt of {record['prompt_tokens']}, then {record['decode_tokens']} "
        f"tokens, {turns}; {machine['cpu']}{driver}, commit {machine['commit'] or 'unknown'}\n\n"
    )
    headers = [
        "peer",
        "decode tok/s",
        "TTFT ms",
        "decode, ours / theirs",
        "prompt, ours / theirs",
        "MB (private)",
        "what",
    ]
    return head + render(
        "md" if style == "md" else "table", headers, [cells(row) for row in record["peers"]], text_columns=(0, 6)
    )


def main() -> int:
    """Parse options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="llama-3.2-3b", metavar="NAME", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("-p", "--prompt-tokens", type=int, default=128, metavar="N", help="(default: 128)")
    parser.add_argument("-n", "--decode-tokens", type=int, default=128, metavar="N", help="(default: 128)")
    parser.add_argument("-r", "--repeats", type=int, default=5, metavar="N", help="turns to take the median of")
    parser.add_argument("--prefill", choices=get_args(Prefill), default="auto", help="how this engine takes prompts")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--threads", type=int, metavar="N", help="on the CPU (default: each engine's own choice)")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="how often to run them all (default: 1)")
    parser.add_argument("--peers", metavar="A,B,...", help="only these, and this engine")
    parser.add_argument("--llama-bench", metavar="PATH", help="llama.cpp's llama-bench")
    parser.add_argument("--format", choices=["table", "md", "json"], default="table", help="how to print the result")
    parser.add_argument("--json", dest="format", action="store_const", const="json", help="short for --format json")
    options = parser.parse_args()
    peers = all_peers(options.llama_bench, options.prefill)
    try:
        geometry = find_preset(options.geometry)
    except AtomFlowError as error:
        parser.error(str(error))
    counts = (options.prompt_tokens, options.decode_tokens, options.repeats, options.rounds, options.threads or 1)
    if min(counts) < 1 or options.threads == 0:
        parser.error("-p, -n, -r, --rounds and --threads must be at least 1.")
    if options.peers:
        requested = {OURS, *options.peers.split(",")}
        unknown = requested - {peer.name for peer in peers}
        if unknown:
            parser.error(f"There is no peer {min(unknown)}; choose of {', '.join(peer.name for peer in peers[1:])}.")
        peers = [peer for peer in peers if peer.name in requested]
    sizes = (options.prompt_tokens, options.decode_tokens, options.repeats)
    task = Task(geometry, *sizes, options.device, options.threads)
    outcomes = run_all(peers, task, lambda text: print(text, file=sys.stderr), options.rounds)
    record = record_of(outcomes, task, options.geometry, options.rounds)
    if options.format == "json":
        print(json_text(record, indent=2))
    else:
        print(report(record, options.format), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
