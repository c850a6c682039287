"""Runs cases within a budget of seconds, and keeps every result as soon as it is there."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numba_atomflow.files.atomic import write_whole
from numba_atomflow.utils.json_text import json_text
from prefill_bench.cases import Case
from prefill_bench.worker import Measurer

FORMAT = "numba-atomflow prefill 1"
_FEWEST_SECONDS = 5.0  # left, below which no case is started
_FAILURES_IN_A_ROW = 3  # in a row, after which the rest of a part for a subject is not tried


class Budget:
    """Seconds for a run, and for parts of it.

    Args:
        seconds: for everything. parts: for single parts. clock: in seconds.
    """

    def __init__(
        self, seconds: float, parts: Mapping[str, float] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock, self._end = clock, clock() + seconds
        self._parts = dict(parts or {})

    def left(self, part: str) -> float:
        """Seconds that a case of this part may take."""
        return min(self._end - self._clock(), self._parts.get(part, float("inf")))

    def spend(self, part: str, seconds: float) -> None:
        """Count a case's seconds."""
        if part in self._parts:
            self._parts[part] -= seconds


class Record:
    """The results so far, as one JSON file that is complete at any moment.

    Args:
        path: of the file; None: none is written.
        head: facts about the run.
    """

    def __init__(self, path: Path | None, head: Mapping[str, Any]) -> None:
        self._path = path
        self.data: dict[str, Any] = {"format": FORMAT, **head, "rows": [], "not_run": []}
        self._save()

    def add(self, row: dict[str, Any]) -> None:
        """A case and what came of it."""
        self.data["rows"].append(row)
        self._save()

    def leave_out(self, case: Case, reason: str) -> None:
        """A case that was not run."""
        self.data["not_run"].append(case.to_dict() | {"reason": reason})
        self._save()

    def _save(self) -> None:
        if self._path:
            write_whole(self._path, json_text(self.data, indent=1).encode(), replace=True)


def run_cases(
    cases: Sequence[Case],
    measurer: Measurer,
    budget: Budget,
    record: Record,
    limits: Mapping[str, float],
    tell: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Measure every case that the budget has time for.

    Args:
        limits: seconds for a case, by lab.
        tell: called with a line per case.
        clock: in seconds.
    """
    failures: dict[tuple[str, str, str], list[str]] = {}
    try:
        for number, case in enumerate(cases, 1):
            kind = case.part, case.model, case.subject
            left, before = budget.left(case.part), failures.setdefault(kind, [])
            if left < _FEWEST_SECONDS:
                record.leave_out(case, "no time left")
                continue
            if len(before) >= _FAILURES_IN_A_ROW:
                record.leave_out(case, f"the {_FAILURES_IN_A_ROW} cases before it failed: {before[-1]}")
                continue
            started = clock()
            answer = measurer.measure(case, min(limits[case.lab], left))
            seconds = clock() - started
            budget.spend(case.part, seconds)
            before[:] = [*before, answer.failure] if answer.failure else []
            measured = answer.measured and vars(answer.measured)
            record.add({"case": case.to_dict(), "measured": measured, "failure": answer.failure, "took": seconds})
            tell(f"[{number}/{len(cases)}] {case.text}: {answer.failure or 'done'} ({seconds:.1f} s)")
    finally:
        measurer.close()
