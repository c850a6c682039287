"""The speed of the working tree as a ratio to that of another revision.

    python scripts/bench_against.py HEAD~1                                 # the demo model
    python scripts/bench_against.py v0.1.0 my-model.safetensors -r 20
    python scripts/bench_against.py main --geometry llama-3.2-3b           # random weights
    python scripts/bench_against.py path/to/another/checkout               # where there is no git

Each side loads the model in a process of its own. Turns of both are interleaved, so that other load on the machine
affects both alike, and the side that goes first alternates. The ratio is taken per pair of turns: above 1, the working
tree is faster. A revision is exported from git into a temporary folder; the repository is not changed.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numba_atomflow import AtomFlowError
from numba_atomflow.checkpoint.find import DEFAULT_MODEL, find_checkpoint
from numba_atomflow.host.machine import commit, machine_record
from numba_atomflow.model.presets import find_preset
from numba_atomflow.utils.json_text import json_text
from numba_atomflow.utils.stats import Spread
from numba_atomflow.utils.tables import render

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("bench_worker.py")


class SideError(Exception):
    """A revision is unknown, or cannot run the task: one sentence."""


@dataclass(frozen=True)
class Turn:
    """Seconds to the first token, and per token after it."""

    ttft: float
    tpot: float


class Side:
    """A process that runs a checkout's engine, with the model loaded.

    Raises:
        SideError: it cannot run the model.
    """

    def __init__(self, name: str, tree: Path, task: dict[str, Any]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(task)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH"))))},
            cwd=tree,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.facts = self._answer()  # device and decode path

    def turn(self) -> Turn:
        """Run a prompt and its reply."""
        assert self._process.stdin is not None
        self._process.stdin.write("turn\n")
        self._process.stdin.flush()
        return Turn(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            _, said = self._process.communicate()
            last = (said.strip().splitlines() or ["it wrote nothing"])[-1].rstrip(".")
            raise SideError(f"{self.name} cannot run this: {last}.")
        record: dict[str, Any] = json.loads(line)
        return record

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


def find_tree(revision: str, folder: Path, repository: Path = ROOT) -> tuple[str, Path]:
    """Name and root of a checkout: `revision` is the path of one, or is exported from git into `folder`.

    Raises:
        SideError: there is no such revision, or no repository.
    """
    path = Path(revision)
    if (path / "numba_atomflow").is_dir():
        return commit(path.resolve()) or path.name, path.resolve()
    return export(revision, folder, repository), folder


def export(revision: str, folder: Path, repository: Path = ROOT) -> str:
    """Export a revision from git into a folder; its short commit.

    Raises:
        SideError: there is no such revision, or no repository.
    """

    def git(*arguments: str) -> bytes:
        done = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, check=False)
        if done.returncode:
            raise SideError(
                f"git knows no revision {revision!r} here ({done.stderr.decode().strip().splitlines()[-1]})."
            )
        return done.stdout

    short = git("rev-parse", "--short", "--verify", "--end-of-options", f"{revision}^{{commit}}").decode().strip()
    with tarfile.open(fileobj=io.BytesIO(git("archive", short))) as archive:
        archive.extractall(folder, filter="data")
    return short


def take_turns(before: Side, now: Side, repeats: int) -> list[tuple[Turn, Turn]]:
    """Interleaved turns (before, now), after a discarded warm-up."""
    pairs = []
    for i in range(repeats + 1):
        if i % 2:
            second = now.turn()
            first = before.turn()
        else:
            first = before.turn()
            second = now.turn()
        pairs.append((first, second))
    return pairs[1:]


def record_of(pairs: Sequence[tuple[Turn, Turn]], names: tuple[str, str], task: dict[str, Any]) -> dict[str, Any]:
    """A JSON-ready record. Ratios are of pairs of turns: above 1, now is faster."""
    record: dict[str, Any] = {"before": names[0], "now": names[1], "task": task, "machine": machine_record()}
    for quantity in ("tpot", "ttft"):
        then, now = ([getattr(pair[side], quantity) for pair in pairs] for side in (0, 1))
        record[quantity] = {
            "before": Spread.of(then).to_dict(),
            "now": Spread.of(now).to_dict(),
            "ratio": Spread.of([a / b for a, b in zip(then, now, strict=True)]).to_dict(),
        }
    return record


def report(record: dict[str, Any]) -> str:
    """A table."""
    rows = []
    for quantity, what in (("tpot", "ms per token"), ("ttft", "ms to the first token")):
        spreads = {name: Spread.from_dict(values) for name, values in record[quantity].items()}
        rows.append([what, spreads["before"].text(3, 1e3), spreads["now"].text(3, 1e3), spreads["ratio"].text(3)])
    return render("table", ["", record["before"], record["now"], "ratio (above 1: faster now)"], rows)


def main() -> int:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", metavar="REV", help="a revision that git knows, or the path of a checkout")
    parser.add_argument("model", nargs="?", help=f"checkpoint, or the name of one (default: {DEFAULT_MODEL})")
    parser.add_argument("--geometry", metavar="NAME", help="instead of a model: a well-known one with random weights")
    parser.add_argument("-p", "--prompt-tokens", type=int, default=128, metavar="N", help="(default: 128)")
    parser.add_argument("-n", "--decode-tokens", type=int, default=64, metavar="N", help="(default: 64)")
    parser.add_argument("-r", "--repeats", type=int, default=10, metavar="N", help="turns of each side (default: 10)")
    parser.add_argument("--backend", default="auto", help="as for numba-atomflow bench")
    parser.add_argument("--decode", default="auto", help="as for numba-atomflow bench")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if min(options.prompt_tokens, options.decode_tokens, options.repeats) < 1:
        parser.error("-p, -n and -r must be at least 1.")
    try:
        task: dict[str, Any] = {
            "prompt_tokens": options.prompt_tokens,
            "decode_tokens": options.decode_tokens,
            "backend": options.backend,
            "decode": options.decode,
            "threads": options.threads,
        }
        if options.geometry:
            task["geometry"] = find_preset(options.geometry).to_dict()
        else:
            task["path"] = str(find_checkpoint(options.model or DEFAULT_MODEL).resolve())
        with tempfile.TemporaryDirectory() as folder:
            name, tree = find_tree(options.revision, Path(folder))
            names = (name, commit(ROOT) or "now")
            print(f"loading {names[0]} and {names[1]}", file=sys.stderr)
            with Side(names[0], tree, task) as before, Side(names[1], ROOT, task) as now:
                pairs = take_turns(before, now, options.repeats)
                facts = {"before": before.facts, "now": now.facts}
    except (SideError, AtomFlowError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    record = record_of(pairs, names, task) | {"engines": facts}
    if options.json:
        print(json_text(record))
    else:
        what = options.geometry or task["path"]
        print(
            f"{what}, {now.facts['device']}, a prompt of {options.prompt_tokens}, then {options.decode_tokens} tokens"
        )
        print(report(record), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
