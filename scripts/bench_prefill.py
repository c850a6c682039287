"""Prompts: projections, attention, time to first token, whole requests and decode, beside cuBLAS, flash attention and
transformers, in one run.

    python scripts/bench_prefill.py                                          # everything, in at most nine minutes
    python scripts/bench_prefill.py projections attention --models llama-3.2-3b
    python scripts/bench_prefill.py projections:120 ttft:200 --budget 400 --out prefill.json
    python scripts/bench_prefill.py projections --only gate_up,down --tokens 512,2048 --variants
    python scripts/bench_prefill.py --read prefill.json --format md          # the tables of an earlier run
    python scripts/bench_prefill.py --compile 9.0 --tests                    # on a machine without a GPU

Parts: ceilings, projections, attention, ttft, requests, decode; NAME:SECONDS limits a part. Each case runs in a worker
process, which is started again after a case that hangs or loses the GPU's context; its messages are in a .log file
beside the record. The record is complete after every case. Kernels need PyTorch with CUDA; requests also transformers.

--compile compiles the kernels of all selected cases into the compile cache (--tests: those of tests/gpu too).
--compiled FOLDER takes machine code from a compile cache of another machine with the same sources.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from prefill_bench.cases import MODELS, PARTS, PATHS, Case, Measured, select
from prefill_bench.predictions import prediction_tables
from prefill_bench.report import tables
from prefill_bench.run import FORMAT, Budget, Record, run_cases
from prefill_bench.worker import Worker

from numba_atomflow.errors import AtomFlowError, OptionError
from numba_atomflow.files.untrusted import load_json
from numba_atomflow.host.machine import machine_record
from numba_atomflow.utils.json_text import json_text

_CASE_SECONDS = {"kernels": 45.0, "engine": 120.0, "peer": 180.0}  # the first case of each also starts it
_BUDGET = 540.0


def parse_parts(texts: Sequence[str]) -> tuple[list[str], dict[str, float]]:
    """Parts, and the seconds of those that are given with some.

    Raises:
        OptionError: there is no such part, or a limit is no positive number.
    """
    names, seconds = [], {}
    for text in texts or PARTS:
        name, colon, limit = text.partition(":")
        if name not in PARTS:
            raise OptionError(f"There is no part {name}; choose of {', '.join(PARTS)}.")
        if colon:
            try:
                seconds[name] = float(limit)
            except ValueError:
                seconds[name] = 0.0
            if not 0 < seconds[name] < float("inf"):
                raise OptionError(f"{text} is no part with a number of seconds; write {name}:120.")
        names.append(name)
    return names, seconds


def options_of(arguments: Sequence[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, and what was given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART[:SECONDS]", help="(default: all)")
    parser.add_argument("--models", default=",".join(MODELS), metavar="A,B,...", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--paths", default=",".join(PATHS), metavar="A,B,...", help="values of --prefill to measure")
    parser.add_argument("--only", default="", metavar="A,B,...", help="only these projections, paths or peers")
    parser.add_argument("--tokens", default="", metavar="N,M,...", help="only these numbers of tokens")
    parser.add_argument(
        "--variants", action="store_true", help="also every other tile of a projection, every other plan of attention"
    )
    parser.add_argument("--budget", type=float, default=_BUDGET, metavar="SECONDS", help="for everything")
    parser.add_argument("--case-seconds", type=float, metavar="SECONDS", help="for one case (by default 45 to 180)")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="the record, written after every case")
    parser.add_argument("--read", type=Path, metavar="FILE", help="measure nothing: the tables of a record")
    parser.add_argument("--format", choices=["table", "md", "json"], default="table", help="how to print the result")
    parser.add_argument("--json", dest="format", action="store_const", const="json", help="short for --format json")
    parser.add_argument("--compile", metavar="CAPABILITY", help="measure nothing: compile for 9.0, say")
    parser.add_argument("--tests", action="store_true", help="with --compile: the kernels of tests/gpu as well")
    parser.add_argument("--compiled", type=Path, metavar="FOLDER", help="a compile cache of another machine")
    parser.add_argument("--predictions", action="store_true", help="measure nothing: what the cost model predicts")
    return parser, parser.parse_args(arguments)


def cases_of(options: argparse.Namespace) -> tuple[list[Case], dict[str, float]]:
    """The selected cases, and the seconds of parts.

    Raises:
        OptionError: an option is wrong.
    """
    parts, seconds = parse_parts(options.parts)
    models, paths = options.models.split(","), options.paths.split(",")
    for given, known in ((models, MODELS), (paths, PATHS)):
        unknown = set(given) - set(known)
        if unknown:
            raise OptionError(f"There is no {min(unknown)}; choose of {', '.join(known)}.")
    try:
        tokens = [int(text) for text in options.tokens.split(",") if text]
    except ValueError:
        raise OptionError(f"--tokens {options.tokens} is no list of numbers; write 512,2048.") from None
    subjects = [text for text in options.only.split(",") if text]
    if not options.budget > 0 or (options.case_seconds is not None and not options.case_seconds > 0):  # NaN is neither
        raise OptionError("--budget and --case-seconds must be positive.")
    cases = select(parts, models, paths, subjects, tokens, variants=options.variants)
    if not cases:
        raise OptionError("No case is left; choose other parts, --only or --tokens.")
    return cases, seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse options, measure, print."""
    parser, options = options_of(arguments)
    try:
        cases, seconds = cases_of(options)
        if options.read:
            return _show(_read(options.read), options.format)
        if options.predictions:
            print(prediction_tables("md" if options.format == "md" else "table"), end="")
            return 0
        if options.compile:
            return _compile(options.compile, cases, tests=options.tests)
        if options.compiled:
            _adopt(options.compiled)
    except AtomFlowError as error:
        parser.error(str(error))
    head = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv[1:]}
    record = Record(options.out, head | {"machine": machine_record()})
    log = (options.out or Path(tempfile.gettempdir()) / "bench_prefill").with_suffix(".log")
    limits = dict.fromkeys(_CASE_SECONDS, options.case_seconds) if options.case_seconds else _CASE_SECONDS
    run_cases(cases, Worker(log), Budget(options.budget, seconds), record, limits, _tell)
    return _show(record.data, options.format)


def _read(path: Path) -> dict[str, Any]:
    """A record of an earlier run.

    Raises:
        OptionError: there is none.
    """
    try:
        record: dict[str, Any] = load_json(path.read_bytes())
    except OSError as error:
        raise OptionError(f"{path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise OptionError(f"{path} is no record of bench_prefill.py.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise OptionError(f"{path} is no record of bench_prefill.py.")
    return record


def _show(record: dict[str, Any], style: Literal["table", "md", "json"]) -> int:
    """Print a record; 1 if a case failed or a result is wrong."""
    print(json_text(record, indent=1) if style == "json" else tables(record, style), end="")
    measured = [Measured.from_dict(row["measured"]) for row in record["rows"] if row["measured"]]
    failed = any(row["failure"] for row in record["rows"]) or any(each.wrong for each in measured)
    return 1 if failed else 0


def _compile(capability: str, cases: Sequence[Case], *, tests: bool) -> int:
    """Compile the kernels of these cases into the compile cache."""
    from prefill_bench.compiled import chip_with, specs_of

    from numba_atomflow.ops import jit
    from numba_atomflow.ops.cuda.runtime.build import build

    chip = chip_with(capability)
    specs = specs_of(cases, chip)
    if tests:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
        from prefill_sweeps import all_kernels

        specs = list(dict.fromkeys([*specs, *(kernel.spec for kernel in all_kernels(chip))]))
    build(specs, chip.capability, lambda what, done, total: _tell(f"[{done}/{total}] {what}"))
    print(f"{len(specs)} kernels in {jit.cache_folder('cuda')}")
    return 0


def _adopt(folder: Path) -> None:
    """Take machine code from another machine's compile cache."""
    from prefill_bench.compiled import adopt

    _tell(f"{adopt(folder)} kernels are compiled")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
