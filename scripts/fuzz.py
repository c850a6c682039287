"""Fuzzing with damaged files: each must be refused in one sentence, or work.

    python scripts/fuzz.py                                   # 60 seconds over all kinds of files
    python scripts/fuzz.py --count 20000 --seed 1            # some minutes
    python scripts/fuzz.py --targets gguf,folder --seconds 600
    python scripts/fuzz.py --replay tests/corpus/NAME        # a case of the corpus, or a finding
    python scripts/fuzz.py --count 2000 --json > fuzz.json

Sound files of a tiny model (checkpoints, Hugging Face folders, GGUF files, chat templates, tokenizers, ground
truths, unfinished quantizations, traces and bench reports) are mutated: bits, ranges, lengths, JSON values, GGUF
metadata. Then they are converted and loaded, and a few tokens are generated. A finding is an exception other than
AtomFlowError, a message that is no sentence, a warning of NumPy, a signal, or more than --limit seconds. Findings of
the same origin count once; each is minimised and written to a folder in --out, for --replay. Cases are determined by
the seed and their number.

Exit code 0: no findings. 1: findings. 2: an option is wrong.
"""

import argparse
import hashlib
import json
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from fuzzing.minimise import minimise
from fuzzing.mutate import mutate
from fuzzing.targets import USES, Files, make_bases, make_fixtures
from fuzzing.worker import Outcome, Worker
from number_lists import at_least

from numba_atomflow.utils.json_text import json_text

SECONDS, LIMIT = 60.0, 5.0
CASE = "case.json"  # facts about a case in its folder; the other files are the case itself
_SHARES = {"unfinished": 0.1}  # weights of targets, 1 by default: a layer takes a hundred times as long as a header
_FEWEST_RUNS = 10  # of minimising a case that hangs or kills the process


@dataclass
class Finding:
    """One fault, with its first case."""

    target: str
    kind: str
    signature: str
    detail: str
    seed: int
    case: int
    folder: str = ""
    times: int = 1


@dataclass
class Report:
    """Results of a run. `outcomes` counts, by target, "ok", classes of errors, and kinds of findings."""

    seed: int
    cases: int = 0
    seconds: float = 0.0
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    findings: dict[str, Finding] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record."""
        outcomes = {name: dict(counts) for name, counts in self.outcomes.items()}  # asdict fails for a Counter
        return asdict(self) | {
            "outcomes": outcomes,
            "findings": [asdict(finding) for finding in self.findings.values()],
        }


class Fuzzer:
    """Makes and runs cases, in a temporary folder that exists within the `with` block."""

    def __init__(self, seed: int, out: Path, targets: list[str], limit: float = LIMIT) -> None:
        self.report = Report(seed, outcomes={name: Counter() for name in targets})
        self._out, self._targets = out, targets
        memory = Path("/dev/shm")  # fsync of every checkpoint would dominate the time on a disk
        self._work = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))
        self._fixtures, self._folder = self._work / "fixtures", self._work / "case"
        self._worker = Worker(self._fixtures, limit)

    def __enter__(self) -> Self:
        try:
            make_fixtures(self._fixtures)
            self.bases = make_bases(self._fixtures, self._work / "bases")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._worker.close()
        shutil.rmtree(self._work, ignore_errors=True)

    def make(self, number: int) -> tuple[str, Files, Files]:
        """Target, damaged files and sound files of a case."""
        rng = random.Random(f"{self.report.seed}:{number}")
        (target,) = rng.choices(self._targets, [_SHARES.get(name, 1.0) for name in self._targets])
        base = rng.choice(self.bases[target])
        files = dict(base)
        for _ in range(rng.choice((1, 1, 1, 2))):
            name = rng.choice(sorted(files))
            if len(files) > 1 and rng.random() < 0.02:
                del files[name]
            else:
                files[name] = mutate(rng, name, files[name])
        return target, files, base

    def run(self, target: str, files: Files) -> Outcome:
        """Run the target on these files."""
        shutil.rmtree(self._folder, ignore_errors=True)
        for name, data in files.items():
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return self._worker.run(target, self._folder)

    def case(self, number: int) -> None:
        """Make a case, run it, and record its outcome."""
        target, files, base = self.make(number)
        outcome = self.run(target, files)
        self.report.cases += 1
        self.report.outcomes[target][outcome.signature if outcome.kind == "refused" else outcome.kind] += 1
        if not outcome.is_finding:
            return
        earlier = self.report.findings.get(outcome.signature)
        if earlier is not None:
            earlier.times += 1
            return
        finding = Finding(target, outcome.kind, outcome.signature, outcome.detail, self.report.seed, number)
        self.report.findings[outcome.signature] = finding

        def fails(candidate: Files) -> bool:
            return self.run(target, candidate).signature == outcome.signature

        small = minimise(files, base, fails, *((_FEWEST_RUNS,) if outcome.kind in ("hang", "signal") else ()))
        digest = hashlib.sha256(outcome.signature.encode()).hexdigest()[:8]
        finding.folder = str(self._out / f"{target}-{digest}")
        write_case(Path(finding.folder), small, base, asdict(finding))


def write_case(folder: Path, files: Files, base: Files, record: dict[str, Any]) -> None:
    """Write the files that differ from the sound ones, and the record."""
    for name, data in files.items():
        if data != base.get(name):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    record = record | {"removed": sorted(set(base) - set(files))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CASE).write_text(json.dumps(record, indent=2) + "\n")


def read_case(folder: Path, bases: dict[str, list[Files]]) -> tuple[str, Files]:
    """Target and files of a written case; missing files come from the target's first sound files."""
    record = json.loads((folder / CASE).read_text())
    stored = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    del stored[CASE]
    sound = next(
        base for base in bases[record["target"]] if set(stored) <= set(base) or base is bases[record["target"]][-1]
    )
    files = {name: data for name, data in sound.items() if name not in record.get("removed", ())}
    return record["target"], files | {name: path.read_bytes() for name, path in stored.items()}


def run(fuzzer: Fuzzer, count: int | None, seconds: float | None, progress: Callable[[Report], None]) -> None:
    """Cases until one of the limits is reached."""
    started, told = time.monotonic(), 0.0
    report = fuzzer.report
    while (count is None or report.cases < count) and (seconds is None or report.seconds < seconds):
        fuzzer.case(report.cases)
        report.seconds = time.monotonic() - started
        if report.seconds - told >= 1:
            told = report.seconds
            progress(report)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=at_least(1), metavar="N", help="cases to run")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help=f"how long to run (default: {SECONDS:.0f}, without --count)"
    )
    parser.add_argument(
        "--seed", type=at_least(0), metavar="N", help="seed of all cases (default: random; it is printed)"
    )
    parser.add_argument(
        "--targets", metavar="A,B", default=",".join(USES), help="kinds of files (default: %(default)s)"
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT, metavar="S", help="seconds of a hang (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("fuzz-findings"), help="folder for findings (default: %(default)s)"
    )
    parser.add_argument("--replay", type=Path, nargs="+", metavar="FOLDER", help="only run these written cases")
    parser.add_argument("--json", action="store_true", help="print a record")
    options = parser.parse_args()
    unknown = [name for name in options.targets.split(",") if name not in USES]
    if unknown:
        parser.error(f"there is no target {unknown[0]!r}; there are {', '.join(USES)}")
    if options.count is None and options.seconds is None:
        options.seconds = SECONDS
    for folder in options.replay or ():
        if not (folder / CASE).is_file():
            parser.error(f"{folder} holds no {CASE}")
    return options


def _show_progress(report: Report) -> None:
    if sys.stderr.isatty():
        found = len(report.findings)
        print(
            f"\r{report.cases} cases, {report.cases / report.seconds:.0f}/s, {found} findings ", end="", file=sys.stderr
        )


def _show(report: Report) -> None:
    print(f"seed {report.seed}: {report.cases} cases in {report.seconds:.1f} s, {len(report.findings)} findings")
    for target, counts in report.outcomes.items():
        print(f"  {target:<13}" + ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    for finding in report.findings.values():
        print(f"\n{finding.kind}, {finding.times} times: {finding.signature}\n  {finding.folder}")
        print("  " + finding.detail.strip().replace("\n", "\n  ")[-1500:])


def _replay(fuzzer: Fuzzer, folders: list[Path]) -> int:
    """Run written cases; how many are findings."""
    found = 0
    for folder in folders:
        outcome = fuzzer.run(*read_case(folder, fuzzer.bases))
        print(f"{folder}: {outcome.kind} {outcome.signature}\n  {outcome.detail}")
        found += outcome.is_finding
    return found


def main() -> int:
    options = _options()
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", file=sys.stderr)
    try:
        with Fuzzer(seed, options.out, options.targets.split(","), options.limit) as fuzzer:
            if options.replay:
                return min(1, _replay(fuzzer, options.replay))
            try:
                run(fuzzer, options.count, options.seconds, _show_progress)
            except KeyboardInterrupt:
                print("stopped", file=sys.stderr)
            report = fuzzer.report
    except KeyboardInterrupt:
        return 130
    print(json_text(report.to_dict(), indent=2)) if options.json else _show(report)
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
