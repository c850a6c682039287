"""Tables of a record: made from its JSON alone, so that those of an interrupted run can be printed too."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from numba_atomflow.utils.stats import Spread
from numba_atomflow.utils.tables import Style, render
from prefill_bench.cases import BACK_TO_BACK, PEER, REPLY, Case, Measured
from prefill_bench.expectations import predicted_seconds, target_ratio, target_seconds

OURS = "ours"
RIVALS = {"projections": "cuBLAS", "attention": "flash"}
_ABSENT = "-"

Row = tuple[Case, Measured]


def tables(record: dict[str, Any], style: Style) -> str:
    """All tables of a record, with a line about the run above them, and what failed or was not run below."""
    rows: list[Row] = []
    failures = []
    for entry in record["rows"]:
        case = Case(**entry["case"])
        if entry["measured"]:
            rows.append((case, Measured.from_dict(entry["measured"])))
        else:
            failures.append(f"failed: {case.text}: {entry['failure']}")
    texts = [_head(record)]
    for title, headers, make, text_columns in _TABLES:
        cells = list(make(rows))
        if cells:
            texts.append(f"{title}\n\n" + render(style, headers, cells, text_columns))
    left_out: dict[tuple[str, str], int] = {}
    for entry in record["not_run"]:
        key = entry["part"], entry["reason"]
        left_out[key] = left_out.get(key, 0) + 1
    texts += ["\n".join(failures) + "\n"] if failures else []
    lines = [f"not run: {count} of {part}: {reason}" for (part, reason), count in left_out.items()]
    texts += ["\n".join(lines) + "\n"] if lines else []
    return "\n".join(texts)


def _head(record: dict[str, Any]) -> str:
    machine = record["machine"]
    driver = f", NVIDIA driver {machine['nvidia_driver']}" if machine["nvidia_driver"] else ""
    return f"{machine['cpu']}{driver}, commit {machine['commit'] or 'unknown'}, {record['date']}\n"


# --- rows ------------------------------------------------------------------------------------------------------------


def _of(rows: Sequence[Row], part: str) -> Iterator[Row]:
    return (row for row in rows if row[0].part == part)


def _ceilings(rows: Sequence[Row]) -> Iterator[Sequence[str]]:
    for _, measured in _of(rows, "ceilings"):
        yield from measured.notes.items()
        for name, value in measured.values.items():
            yield [name, f"{value:.0f}"]


def _kernels(part: str) -> Callable[[Sequence[Row]], Iterator[list[str]]]:
    """Cells of the table of `part`: ours against its rival."""
    rival = RIVALS[part]

    def make(rows: Sequence[Row]) -> Iterator[list[str]]:
        for case, measured in _of(rows, part):
            ours, theirs = measured.spread(OURS), measured.spread(rival)
            ratio, target = measured.ratio(OURS, rival), target_ratio(case)
            yield [
                f"{case.model} {case.subject}",
                str(case.tokens),
                _rate(measured.flop, theirs),
                _rate(measured.flop, ours),
                _ABSENT if ours is None else ours.text(1, 1e6),
                _ABSENT if ratio is None else ratio.text(2),
                _verdict(ratio and ratio.median, target, at_least=True),
                _seconds(predicted_seconds(case), 1e6, 1),
                _errors(measured),
                _others(measured, rival),
            ]

    return make


def _rate(flop: float, spread: Spread | None) -> str:
    return _ABSENT if spread is None else f"{flop / spread.median / 1e12:.0f}"


def _errors(measured: Measured) -> str:
    """Our error, and that of every other side; what is wrong is said."""
    texts = [f"{error:.1e}" if side == OURS else f"{side} {error:.1e}" for side, error in measured.errors.items()]
    return ", ".join(texts + [f"WRONG: {side}" for side in measured.wrong]) or _ABSENT


def _others(measured: Measured, rival: str) -> str:
    """The plan, and the other sides' medians, fastest first."""
    spreads = {side: measured.spread(side) for side in measured.seconds if side not in (OURS, rival)}
    ordered = sorted((spread.median, side) for side, spread in spreads.items() if spread is not None)
    sides = [f"{side} {median * 1e6:.1f}" for median, side in ordered]
    return "; ".join([*measured.notes.values(), *sides])


def _ttft(rows: Sequence[Row]) -> Iterator[list[str]]:
    for case, measured in _of(rows, "ttft"):
        spread, target = measured.spread("ttft"), target_seconds(case)
        back_to_back = measured.spread(BACK_TO_BACK)
        if spread is None:
            continue
        yield [
            case.model,
            case.subject,
            str(case.tokens),
            spread.text(2, 1e3),
            _ABSENT if back_to_back is None else back_to_back.text(2, 1e3),
            f"{case.tokens / spread.median:.0f}",
            _seconds(predicted_seconds(case), 1e3, 2),
            _verdict(spread.median, target, at_least=False, factor=1e3),
            "; ".join(measured.notes.values()),
        ]


def _requests(rows: Sequence[Row]) -> Iterator[list[str]]:
    totals = {
        (case.model, case.tokens, case.subject): measured.spread("total") for case, measured in _of(rows, "requests")
    }
    for case, measured in _of(rows, "requests"):
        total, ttft, tpot = (measured.spread(side) for side in ("total", "ttft", "tpot"))
        theirs = totals.get((case.model, case.tokens, PEER))
        if total is None or ttft is None or tpot is None:
            continue
        ahead = theirs.ratio_to(total).text(2) if theirs and case.subject != PEER else _ABSENT
        figures = [total.text(1, 1e3), ttft.text(2, 1e3), f"{1 / tpot.median:.0f}", ahead]
        yield [case.model, case.subject, str(case.tokens), *figures, "; ".join(measured.notes.values())]


def _decode(rows: Sequence[Row]) -> Iterator[list[str]]:
    for case, measured in _of(rows, "decode"):
        spread = measured.spread("tpot")
        if spread is not None:
            speed = Spread(1 / spread.median, 1 / spread.high, 1 / spread.low, spread.count)
            notes = "; ".join(measured.notes.values())
            yield [case.model, case.subject, str(case.tokens), speed.text(1), spread.text(3, 1e3), notes]


def _seconds(value: float | None, factor: float, digits: int) -> str:
    return _ABSENT if value is None else f"{value * factor:.{digits}f}"


def _verdict(value: float | None, target: float | None, *, at_least: bool, factor: float = 1.0) -> str:
    """The target, and whether it is met."""
    if target is None:
        return ""
    if value is None:
        return f"{target * factor:g}"
    met = value >= target if at_least else value <= target
    return f"{target * factor:g} {'met' if met else 'MISSED'}"


_KERNEL_HEADERS = ["us (ours)", "ratio", "target", "predicted us", "error", "plan; variants us"]
_TABLES: tuple[tuple[str, list[str], Callable[[Sequence[Row]], Iterator[Sequence[str]]], tuple[int, ...]], ...] = (
    ("Ceilings, measured in this run", ["what", ""], _ceilings, (0,)),
    (
        "Projections against cuBLAS fp16; ratio: our speed over cuBLAS's, round by round",
        ["projection", "tokens", "cuBLAS TFLOP/s", "ours TFLOP/s", *_KERNEL_HEADERS],
        _kernels("projections"),
        (0, 9),
    ),
    (
        "Attention against torch's flash attention; a prompt in chunks against one call",
        ["attention", "tokens", "flash TFLOP/s", "ours TFLOP/s", *_KERNEL_HEADERS],
        _kernels("attention"),
        (0, 9),
    ),
    (
        "Time to first token, after a pause",
        ["model", "prefill", "prompt", "TTFT ms", "back to back", "tok/s", "predicted ms", "target ms", "notes"],
        _ttft,
        (0, 1, 8),
    ),
    (
        f"Whole requests: prompt and a reply of {REPLY}; ratio: the peer's time over ours",
        ["model", "engine", "prompt", "total ms", "TTFT ms", "decode tok/s", "peer / ours", "notes"],
        _requests,
        (0, 1, 7),
    ),
    (
        "Decode",
        ["model", "prefill", "depth", "tok/s", "TPOT ms", "notes"],
        _decode,
        (0, 1, 5),
    ),
)
