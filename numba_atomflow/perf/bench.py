"""Benchmark: prompt and decode speed at several depths of context, as a share of achievable bandwidth.

For each depth the KV cache is filled once; then prefill and decode alternate, each starting at that depth:

- a prompt of P tokens: TTFT, and P / TTFT;
- N decode steps: TPOT of each, N / their sum, and bytes per token over the median TPOT.

Tokens are random, decoding is greedy, and the first turn is a discarded warm-up.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from numba_atomflow.backends.base import DecodePath, PrefillPath
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.engine import Engine
from numba_atomflow.errors import AtomFlowError, OptionError
from numba_atomflow.files.text_input import MOST_BYTES
from numba_atomflow.files.untrusted import load_json, quote, short
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.host.machine import machine_record
from numba_atomflow.model.step import SAMPLE
from numba_atomflow.perf.compile_times import CompileTimes
from numba_atomflow.rope_scaling import LARGEST_COUNT
from numba_atomflow.sampling import SamplingParams
from numba_atomflow.utils.arguments import whole_number
from numba_atomflow.utils.progress import Progress
from numba_atomflow.utils.stats import Spread

FORMAT = "numba-atomflow bench 1"
_LONGEST_TEXT = 1000  # characters of a name or path in a report
_EARLIER_CEILINGS = {"copy engine": "TMA"}  # names in reports of earlier versions, as they were written


@dataclass(frozen=True)
class Settings:
    """Parameters of a benchmark.

    Raises:
        OptionError: a number is out of range.
    """

    prompt_tokens: int = 512
    decode_tokens: int = 128
    depths: tuple[int, ...] = (0,)
    repeats: int = 5

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "decode_tokens", "repeats"):
            number = whole_number(name, getattr(self, name))
            if number < 1:
                raise OptionError(f"{name} is {quote(number)}; it must be at least 1.")
            object.__setattr__(self, name, number)
        object.__setattr__(self, "depths", tuple(whole_number("a depth", depth) for depth in self.depths))
        if not self.depths or min(self.depths) < 0 or len(set(self.depths)) < len(self.depths):
            raise OptionError(f"depths are {list(self.depths)}; give different numbers of tokens, 0 or more.")

    def positions(self, geometry: ModelGeometry) -> int:
        """Positions that the KV cache needs.

        Raises:
            OptionError: the model has fewer.
        """
        longest = max(self.prompt_tokens, self.decode_tokens + 1)
        needed = max(self.depths) + longest
        if needed > geometry.max_positions:
            raise OptionError(
                f"A depth of {max(self.depths)} and {longest} tokens after it need {needed} positions, but the model "
                f"has {geometry.max_positions}; measure at a smaller depth."
            )
        return needed


@dataclass(frozen=True)
class DepthResult:
    """Results at one depth. Times in seconds, speeds in tokens per second."""

    depth: int
    prompt_speed: Spread
    ttft: Spread
    decode_speed: Spread
    tpot: Spread
    bytes_per_token: int  # weights and KV cache that a decode step reads, mean over the steps

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes per token over the median TPOT."""
        return self.bytes_per_token / self.tpot.median / 1e9

    def to_dict(self, ceilings: dict[str, float]) -> dict[str, Any]:
        """A JSON-ready record, with the share of every ceiling."""
        speed = self.gigabytes_per_second
        shares = {name: speed / ceiling for name, ceiling in ceilings.items()}
        return asdict(self) | {"gigabytes_per_second": speed, "share_of_ceiling": shares}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "DepthResult":
        """The inverse of `to_dict`; KeyError, TypeError or ValueError if it is no such record."""
        spreads = {name: Spread.from_dict(record[name]) for name in ("prompt_speed", "ttft", "decode_speed", "tpot")}
        return cls(depth=int(record["depth"]), bytes_per_token=int(record["bytes_per_token"]), **spreads)


@dataclass(frozen=True)
class BenchReport:
    """Results of a run, with the facts to repeat it."""

    model: str
    random_weights: bool
    geometry: ModelGeometry
    backend: str
    device: str
    settings: Settings
    ceilings: dict[str, float]  # achievable bandwidth in GB/s by way of reading, measured in this run
    results: list[DepthResult]
    load_seconds: float
    compile_times: CompileTimes | None = None
    decode: DecodePath | None = None  # None on the CPU
    prefill: PrefillPath | None = None  # None on the CPU
    machine: dict[str, Any] = field(default_factory=machine_record)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record; `read_report` reads it back."""
        record = asdict(self) | {"results": [result.to_dict(self.ceilings) for result in self.results]}
        return {"format": FORMAT} | record

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "BenchReport":
        """The inverse of `to_dict`; KeyError, TypeError or ValueError if it is no such record."""
        if record["format"] != FORMAT:
            raise ValueError(record["format"])
        _check_report(record)
        settings, times = record["settings"], record["compile_times"]
        path, prefill = record.get("decode"), record.get("prefill")  # earlier versions had no choice
        fields = dict(record) | {
            "geometry": ModelGeometry.from_dict(record["geometry"]),
            "ceilings": {_EARLIER_CEILINGS.get(name, name): speed for name, speed in record["ceilings"].items()},
            "settings": Settings(**settings | {"depths": tuple(settings["depths"])}),
            "results": [DepthResult.from_dict(result) for result in record["results"]],
            "compile_times": None if times is None else CompileTimes(**times),
            "decode": None if path is None else DecodePath(**path),
            "prefill": None if prefill is None else PrefillPath(**prefill),
        }
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__})


def bench(
    engine: Engine,
    settings: Settings,
    compile_times: CompileTimes | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure an engine with a KV cache of at least `settings.positions`.

    Args:
        engine: its KV cache is overwritten.
        settings: parameters of the benchmark.
        compile_times: for the report.
        progress: called with turns done and turns in all.
    """
    turns = (settings.repeats + 1) * len(settings.depths)
    ceilings = engine.backend.measure.ceilings()
    results = []
    for i, depth in enumerate(sorted(settings.depths)):

        def report(turn: int, depth: int = depth, turns_before: int = i * (settings.repeats + 1)) -> None:
            if progress:
                progress(f"depth {depth}", turns_before + turn, turns)

        results.append(_measure_depth(engine, depth, settings, report))
    return BenchReport(
        model=str(engine.checkpoint.path),
        random_weights=isinstance(engine.checkpoint, RandomModel),
        geometry=engine.geometry,
        backend=engine.backend.name,
        device=engine.backend.device,
        settings=settings,
        ceilings=ceilings,
        results=results,
        load_seconds=engine.load_seconds,
        compile_times=compile_times,
        decode=engine.backend.decode_path,
        prefill=engine.backend.prefill_path,
    )


def _measure_depth(engine: Engine, depth: int, settings: Settings, report: Callable[[int], None]) -> DepthResult:
    vocabulary = engine.geometry.vocabulary
    tokens = np.random.default_rng(0).integers(0, vocabulary, depth + settings.prompt_tokens).tolist()
    prompt_speeds, ttfts, decode_speeds, tpots = [], [], [], []
    engine.reset()
    if depth:
        engine.feed(tokens[:depth])
    for turn in range(settings.repeats + 1):
        report(turn)
        engine.rewind(depth)
        ttft = prompt_turn(engine, tokens)
        engine.rewind(depth)
        seconds = decode_turn(engine, tokens[: depth + 1], settings.decode_tokens)
        if turn:  # not the warm-up
            ttfts.append(ttft)
            prompt_speeds.append(settings.prompt_tokens / ttft)
            decode_speeds.append(len(seconds) / sum(seconds))
            tpots += seconds
    report(settings.repeats + 1)
    return DepthResult(
        depth=depth,
        prompt_speed=Spread.of(prompt_speeds),
        ttft=Spread.of(ttfts),
        decode_speed=Spread.of(decode_speeds),
        tpot=Spread.of(tpots),
        bytes_per_token=bytes_per_token(engine, depth + 1, settings.decode_tokens),
    )


def prompt_turn(engine: Engine, tokens: Sequence[int]) -> float:
    """TTFT in seconds; tokens that are in the KV cache already are not computed."""
    return engine.generate_tokens(tokens, SamplingParams(max_tokens=1)).finish().stats.ttft


def decode_turn(engine: Engine, prompt: Sequence[int], count: int) -> list[float]:
    """Seconds of each of `count` decode steps after a prompt."""
    reply = engine.generate_tokens(prompt, SamplingParams(max_tokens=count + 1, ignore_eos=True, speculate="off"))
    next(reply)
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        next(reply)
        seconds.append(time.perf_counter() - started)
    return seconds


def bytes_per_token(engine: Engine, position: int, count: int) -> int:
    """Bytes of weights and KV cache that a decode step reads: the mean over `count` steps from `position` on."""
    ops = engine.backend.step(1, SAMPLE)
    lengths = position + 1, position + count  # of the first and the last step: each step reads one position more
    return sum(op.weight_bytes + sum(op.cache_bytes(length) for length in lengths) // 2 for op in ops)


def _check_report(record: dict[str, Any]) -> None:
    """Check the types of all values that are compared or shown: KeyError, TypeError or ValueError if one is wrong."""
    numbers = (*record["ceilings"].values(), *(record["compile_times"] or {}).values())
    texts = [record["model"], record["device"], record["backend"], record["date"]]
    machine, paths = record["machine"], [record.get(name) for name in ("decode", "prefill")]
    facts = [*machine["versions"].items(), *((name, value) for name, value in machine.items() if name != "versions")]
    for name, value in [*facts, *(fact for path in paths for fact in (path or {}).items())]:
        texts += [name, *([] if value is None else [str(value) if type(value) is int else value])]
    counts = [record["settings"][name] for name in ("prompt_tokens", "decode_tokens", "repeats")]
    counts += [*record["settings"]["depths"], *(result["depth"] for result in record["results"])]
    valid = (
        all(type(value) in (int, float) and 0 < value < math.inf for value in numbers)
        and all(isinstance(text, str) and text.isprintable() and len(text) < _LONGEST_TEXT for text in texts)
        and all(type(count) is int and 0 <= count <= LARGEST_COUNT for count in counts)
    )
    if not valid:
        raise ValueError("a value of a wrong type")


# --- two reports -----------------------------------------------------------------------------------------------------


def read_report(path: Path) -> BenchReport:
    """An earlier report.

    Raises:
        OptionError: the file cannot be read, or is no report.
    """
    try:
        with path.open("rb") as file:
            return BenchReport.from_dict(load_json(file.read(MOST_BYTES)))
    except OSError as error:
        raise OptionError(f"{path} cannot be read ({error.strerror}); give a report to compare with.") from error
    except (KeyError, TypeError, ValueError, AttributeError, AtomFlowError) as error:
        raise OptionError(f"{path} is no report; make one with `numba-atomflow bench --format json`.") from error


def check_comparable(earlier: BenchReport, geometry: ModelGeometry, settings: Settings) -> None:
    """Check that a run can be compared with an earlier report.

    Raises:
        OptionError: another model, other numbers of tokens, or no depth in common.
    """
    other = earlier.settings
    if earlier.geometry != geometry:
        raise OptionError(f"The report to compare with is of another model, {short(earlier.model)}; run that one.")
    if (other.prompt_tokens, other.decode_tokens) != (settings.prompt_tokens, settings.decode_tokens):
        raise OptionError(
            f"The report to compare with has -p {other.prompt_tokens} -n {other.decode_tokens}; give the same."
        )
    if not set(other.depths) & set(settings.depths):
        depths = short(",".join(str(depth) for depth in other.depths))
        raise OptionError(f"The report to compare with has no depth in common; give --depths {depths}.")


@dataclass(frozen=True)
class Ratio:
    """Ratios of speeds at one depth to those of an earlier report: above 1 is faster now."""

    depth: int
    prompt_speed: Spread
    decode_speed: Spread


def compare(now: BenchReport, earlier: BenchReport) -> list[Ratio]:
    """Ratios at every depth that both reports have."""
    earlier_results = {result.depth: result for result in earlier.results}
    return [
        Ratio(
            result.depth,
            result.prompt_speed.ratio_to(earlier_results[result.depth].prompt_speed),
            result.decode_speed.ratio_to(earlier_results[result.depth].decode_speed),
        )
        for result in now.results
        if result.depth in earlier_results
    ]


def differences(now: BenchReport, earlier: BenchReport) -> dict[str, tuple[Any, Any]]:
    """Other facts that differ between two reports: name to (earlier, now)."""

    def facts(report: BenchReport) -> dict[str, Any]:
        machine = {name: value for name, value in report.machine.items() if name != "versions"}
        where = {"model": report.model, "backend": report.backend, "device": report.device}
        how = {"decode": report.decode and report.decode.name, "prefill": report.prefill and report.prefill.name}
        return {**where, **how, **machine, **report.machine["versions"]}

    old, new = facts(earlier), facts(now)
    return {name: (old.get(name), new.get(name)) for name in new | old if old.get(name) != new.get(name)}
