"""The result of a validation: dataclasses, JSON, and a table."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from numba_atomflow.utils.json_text import finite

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class WorstElement:
    """The element with the largest absolute difference."""

    position: int
    index: int
    actual: float
    expected: float


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """One probe over all positions.

    Attributes:
        name, op: of the probe, and of the op that computes it.
        in_table: a probe of the table, not a stage.
        relative_l2: over all positions together.
        cosine: the smallest cosine similarity of a position.
        worst_row: the position with the largest share of its tolerance.
        worst_row_l2, tolerance: relative L2 error and tolerance at that position.
        prefill_share, decode_share: the largest share of tolerance of the positions of the prompt, and of the decode
            steps; infinite for NaN, and for a position that was not compared.
        worst: the element with the largest difference.
        added: relative L2 over all positions where each op was fed the reference's inputs: its own error; None if that
            was not tried.
        added_share: the largest share of its tolerance of a position.
    """

    name: str
    op: str
    in_table: bool
    relative_l2: float
    cosine: float
    worst_row: int
    worst_row_l2: float
    tolerance: float
    prefill_share: float
    decode_share: float
    worst: WorstElement | None
    added: float | None = None
    added_share: float | None = None

    @property
    def inherited(self) -> float | None:
        """The rest of `relative_l2`, which the op's inputs had: errors are independent, so that their squares add."""
        return None if self.added is None else max(self.relative_l2**2 - self.added**2, 0.0) ** 0.5

    @property
    def share(self) -> float:
        """Share of tolerance at the worst position."""
        return max(self.prefill_share, self.decode_share)

    @property
    def passed(self) -> bool:
        """Every position is within its tolerance."""
        return self.share <= 1.0 and (self.added_share is None or self.added_share <= 1.0)


@dataclass(frozen=True, slots=True)
class LogitsResult:
    """Logits compared as distributions: KL(reference || model) in nats, and arg-max agreement."""

    positions: int
    agreed: int
    mean_kl: float
    max_kl: float
    first_disagreement: int | None  # the first position with another arg-max
    next_token: int  # after the prompt
    expected_token: int


@dataclass(frozen=True, slots=True)
class Fault:
    """The first divergent op: the first comparison that failed, in execution order.

    The inputs of an op are compared before it runs, so its inputs were within tolerance.
    """

    op: str
    probe: str
    position: int


@dataclass(frozen=True)
class Report:
    """A whole validation."""

    reference: str
    backend: str
    prompt_tokens: int
    decode_steps: int
    isolated: bool
    probes: list[ProbeResult]  # in execution order, stages included
    fault: Fault | None
    logits: LogitsResult | None
    position_shares: list[float]  # of tolerance: the largest of any probe, by position

    @property
    def table(self) -> list[ProbeResult]:
        """The probes of the table."""
        return [probe for probe in self.probes if probe.in_table]

    @property
    def passed(self) -> bool:
        """No comparison of a probe or a stage failed."""
        return self.fault is None and all(probe.passed for probe in self.probes)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record; NaN and infinities become None."""
        record = asdict(self)
        for probe, entry in zip(self.probes, record["probes"], strict=True):
            entry |= {"share": probe.share, "passed": probe.passed, "inherited": probe.inherited}
        cleaned: dict[str, Any] = finite(record | {"passed": self.passed, "verdict": self.verdict()})
        return cleaned

    def verdict(self) -> str:
        """The last line: the number of probes that pass, and the first failure."""
        table, stages = self.table, [probe for probe in self.probes if not probe.in_table]
        passed = sum(probe.passed for probe in table)
        counts = f"{passed}/{len(table)} probes" if table else ""
        if stages:
            counts += f"{', ' if counts else ''}{sum(probe.passed for probe in stages)}/{len(stages)} inner stages"
        if self.passed:
            return f"PASS: {counts}."
        failed = next((probe.name for probe in self.probes if not probe.passed), "none")
        line = f"FAIL: {counts}; first failing probe: {failed}"
        if self.fault is not None:
            line += f"; op at fault: {self.fault.op} ({self.fault.probe}, position {self.fault.position})"
        return line + "."

    def rows(self) -> list[ProbeResult]:
        """Rows of the table: its probes, and every stage that failed."""
        return [probe for probe in self.probes if probe.in_table or not probe.passed]

    def rich_table(self) -> "Table":
        """The table, for a rich console."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        table.add_column("probe")
        for heading in ("relative L2", "cosine", "worst position", "tolerance", "prefill", "decode"):
            table.add_column(heading, justify="right")
        has_added = any(probe.added is not None for probe in self.probes)
        if has_added:
            for heading in ("added", "of its tolerance", "inherited"):
                table.add_column(heading, justify="right")
        table.add_column("worst element")
        table.add_column("")
        for probe in self.rows():
            worst = probe.worst
            element = f"[{worst.position}, {worst.index}] {worst.actual:.6g} for {worst.expected:.6g}" if worst else ""
            table.add_row(
                probe.name if probe.in_table else f"  {probe.name}",
                f"{probe.relative_l2:.2e}",
                f"{probe.cosine:.9f}",
                f"{probe.worst_row_l2:.2e} at {probe.worst_row}",
                f"{probe.tolerance:.2e}",
                _percent(probe.prefill_share),
                _percent(probe.decode_share) if self.decode_steps else "-",
                *(_added_cells(probe) if has_added else ()),
                element.replace("[", "\\["),
                "[green]PASS[/]" if probe.passed else "[red]FAIL[/]",
            )
        return table


def _added_cells(probe: ProbeResult) -> tuple[str, str, str]:
    if probe.added is None or probe.added_share is None:
        return "-", "-", "-"
    return f"{probe.added:.2e}", _percent(probe.added_share), f"{probe.inherited:.2e}"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 100 else f"{share:.1e} x"
