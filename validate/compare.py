"""Compares a backend with a reference: every probe at every position."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.base import Backend, Observer
from numba_atomflow.errors import ContextError, OptionError
from numba_atomflow.model.step import NO_LOGITS, SAMPLE, Attention
from numba_atomflow.utils.progress import Progress
from numba_atomflow.validate.isolation import Isolation
from numba_atomflow.validate.precision import Precision
from numba_atomflow.validate.probes import Probe, Prober, Rows, all_probes
from numba_atomflow.validate.reference import Reference
from numba_atomflow.validate.report import Fault, LogitsResult, ProbeResult, Report, WorstElement
from numba_atomflow.validate.tolerance import tolerances
from numba_atomflow.validate.walk import walk


def check(
    backend: Backend,
    reference: Reference,
    *,
    isolate: bool = False,
    added: bool = False,
    layers: range | None = None,
    block: int | None = None,
    observers: Sequence[Observer] = (),
    progress: Progress | None = None,
) -> Report:
    """Run a backend teacher-forced on the reference's tokens, and compare every probe.

    Args:
        backend: of the same model; its KV cache is overwritten.
        reference: a ground truth, or a recording of another backend.
        isolate: give each layer (and the final norm) the reference's input, so that errors do not propagate.
        added: run the tokens once more, each op with the reference's inputs: what it adds to the error it inherits.
        layers: compare only these layers, without embedding, final norm and logits.
        block: tokens per step of the prompt; the backend's own if None, 1 to take it as decode steps.
        observers: called for every op before its probes are read; they may change its outputs.
        progress: called with a description, tokens done and total tokens.

    Raises:
        ContextError: the backend's KV cache is too short for the reference's tokens.
        OptionError: `layers` is not within the model, or `block` is not positive.
        GroundTruthError: another program has modified the reference's file since it was opened.
    """
    _check_options(backend, reference, layers, block)

    def compared(isolation: Isolation) -> _Run:
        return _compare(backend, reference, isolation, layers, block, observers, progress)

    run = compared("layers" if isolate else "none")
    results, fault = [probe.result() for probe in run.errors.values()], run.fault
    if added:
        own = compared("ops")
        results = [_with_added(result, own.errors[result.name].result()) for result in results]
        fault = own.fault or fault  # where nothing is inherited, the op is named with certainty
    reference.check_unchanged()
    return Report(
        reference=reference.label,
        backend=f"{backend.name} ({backend.device})",
        prompt_tokens=reference.prompt_tokens,
        decode_steps=len(reference.tokens) - reference.prompt_tokens,
        isolated=isolate,
        probes=results,
        fault=fault,
        logits=run.errors["logits"].logits_result() if "logits" in run.errors else None,
        position_shares=run.position_shares(),
    )


class _Run(NamedTuple):
    """One run of the tokens: errors by probe, and the first comparison that failed."""

    errors: "dict[str, _ProbeErrors]"
    fault: Fault | None

    def position_shares(self) -> list[float]:
        """The largest share of its tolerance that any probe has at each position."""
        shares = np.max([probe.shares() for probe in self.errors.values()], axis=0)
        return [float(share) for share in shares]


def _compare(
    backend: Backend,
    reference: Reference,
    isolation: Isolation,
    layers: range | None,
    block: int | None,
    observers: Sequence[Observer],
    progress: Progress | None,
) -> _Run:
    probes = all_probes(reference.geometry)
    allowed = tolerances(reference, Precision.of_ops(backend.step(1, SAMPLE)), isolation)
    compared = [probe for probe in probes if layers is None or probe.layer in layers]
    errors = {probe.name: _ProbeErrors(probe, reference, allowed[probe.name]) for probe in compared}
    first_fault = _FirstFault()

    def compare(probe: Probe, start: int, rows: Rows) -> None:
        if probe.name in errors:
            first_fault.add(probe, errors[probe.name].add(start, rows))

    prober = Prober(probes, compare, first_fault.check_position, reference.rows, observers, isolation)
    walk(backend, reference.tokens, reference.prompt_tokens, prober, block, progress)
    return _Run(errors, first_fault.fault)


def _with_added(result: ProbeResult, own: ProbeResult) -> ProbeResult:
    return replace(result, added=own.relative_l2, added_share=own.share)


def _check_options(backend: Backend, reference: Reference, layers: range | None, block: int | None) -> None:
    positions = next(op.keys.shape[0] for op in backend.step(1, NO_LOGITS) if isinstance(op, Attention))
    if len(reference.tokens) > positions:
        raise ContextError(
            f"The reference has {len(reference.tokens)} tokens, but the context holds {positions}; raise --max-seq-len."
        )
    if layers is not None and (not layers or layers.start < 0 or layers.stop > reference.geometry.layers):
        raise OptionError(
            f"--layers {layers.start}:{layers.stop} is not within the model's 0:{reference.geometry.layers}; "
            "choose others."
        )
    if block is not None and block < 1:
        raise OptionError(f"--block is {block}; it must be at least 1.")


class _FirstFault:
    """The first comparison that failed, in execution order."""

    def __init__(self) -> None:
        self.fault: Fault | None = None

    def add(self, probe: Probe, failed_position: int | None) -> None:
        if failed_position is not None and self.fault is None:
            self.fault = Fault(probe.op, probe.name, failed_position)

    def check_position(self, expected: int, actual: int) -> None:
        if expected != actual and self.fault is None:
            self.fault = Fault("advance", f"position ({actual} instead of {expected})", expected - 1)


@dataclass
class _ProbeErrors:
    """Accumulated errors of one probe; arrays are per position."""

    probe: Probe
    reference: Reference
    allowed: NDArray[np.float64]
    errors: NDArray[np.float64] = field(init=False)
    cosines: NDArray[np.float64] = field(init=False)
    squared_error: float = 0.0
    squared_size: float = 0.0
    worst: WorstElement | None = None
    agreed: int = 0  # positions with the same arg-max of logits
    first_disagreement: int | None = None
    divergences: list[float] = field(default_factory=list)
    argmax_tokens: dict[int, int] = field(default_factory=dict)  # position to arg-max token

    def __post_init__(self) -> None:
        positions = len(self.reference.tokens)
        self.errors = np.full(positions, -1.0)  # -1: not compared
        self.cosines = np.ones(positions)

    def add(self, start: int, rows: Rows) -> int | None:
        """Compare rows with the reference; returns the first position that is out of tolerance, or None."""
        actual = rows.astype(np.float64)
        expected = self.reference.rows(self.probe.name, start, len(rows)).astype(np.float64)
        difference = np.abs(actual - expected)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            size = np.linalg.norm(expected, axis=1)
            errors = np.linalg.norm(difference, axis=1) / np.where(size > 0, size, 1.0)
            cosines = np.sum(actual * expected, axis=1) / (size * np.linalg.norm(actual, axis=1))
        errors[~np.isfinite(errors)] = np.inf
        cosines[~np.isfinite(cosines)] = 0.0
        span = slice(start, start + len(rows))
        new = self.errors[span] < 0  # rows of the KV cache are compared again at every step
        self.errors[span] = np.maximum(self.errors[span], errors)
        self.cosines[span] = np.minimum(self.cosines[span], cosines)
        self.squared_error += float(np.sum(difference[new] ** 2))
        self.squared_size += float(np.sum(expected[new] ** 2))
        self._find_worst(start, actual, expected, difference)
        if self.probe.name == "logits":
            self._compare_logits(start, actual, expected)
        failed = np.flatnonzero(~(errors <= self.allowed[span]))
        return start + int(failed[0]) if failed.size else None

    def _find_worst(
        self, start: int, actual: NDArray[np.float64], expected: NDArray[np.float64], difference: NDArray[np.float64]
    ) -> None:
        difference = np.where(np.isfinite(difference), difference, np.inf)
        row, index = np.unravel_index(int(difference.argmax()), difference.shape)
        if self.worst is None or difference[row, index] > abs(self.worst.actual - self.worst.expected):
            self.worst = WorstElement(
                start + int(row), int(index), float(actual[row, index]), float(expected[row, index])
            )

    def _compare_logits(self, start: int, actual: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
        for i, (logits, target) in enumerate(zip(actual, expected, strict=True)):
            if start + i in self.argmax_tokens:
                continue  # the last row of the prompt comes twice: with its step, and with the others
            self.argmax_tokens[start + i] = int(logits.argmax())
            agrees = logits.argmax() == target.argmax()
            self.agreed += int(agrees)
            if not agrees and (self.first_disagreement is None or start + i < self.first_disagreement):
                self.first_disagreement = start + i  # the last row of the prompt comes before the others
            log_q, log_p = _log_softmax(logits), _log_softmax(target)
            self.divergences.append(float(np.sum(np.exp(log_p) * (log_p - log_q))))

    def shares(self) -> NDArray[np.float64]:
        """Share of tolerance at each position; infinite where nothing was compared."""
        shares: NDArray[np.float64] = np.where(self.errors >= 0, self.errors / self.allowed, np.inf)
        return shares

    def result(self) -> ProbeResult:
        """The probe's row of the report."""
        shares = self.shares()
        prompt = self.reference.prompt_tokens
        worst = int(shares.argmax())
        return ProbeResult(
            name=self.probe.name,
            op=self.probe.op,
            in_table=self.probe.in_table,
            relative_l2=float(np.sqrt(self.squared_error / self.squared_size)) if self.squared_size else np.inf,
            cosine=float(self.cosines.min()),
            worst_row=worst,
            worst_row_l2=float(self.errors[worst]),
            tolerance=float(self.allowed[worst]),
            prefill_share=float(shares[:prompt].max()),
            decode_share=float(shares[prompt:].max(initial=0.0)),
            worst=self.worst,
        )

    def logits_result(self) -> LogitsResult:
        """KL divergence and arg-max agreement."""
        last = self.reference.prompt_tokens - 1
        return LogitsResult(
            positions=len(self.argmax_tokens),
            agreed=self.agreed,
            mean_kl=float(np.mean(self.divergences)),
            max_kl=float(np.max(self.divergences)),
            first_disagreement=self.first_disagreement,
            next_token=self.argmax_tokens[last],
            expected_token=int(self.reference.tensors["logits"][last].argmax()),
        )


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max()
    result: NDArray[np.float64] = shifted - np.log(np.sum(np.exp(shifted)))
    return result
