"""A validation as one HTML file: verdict, pictures and a table, without scripts and without anything from elsewhere."""

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from numba_atomflow.files.untrusted import characters_of_xml
from numba_atomflow.validate.pictures import Cell, Series, heat_legend, heat_map, log_chart
from numba_atomflow.validate.replay import ReplayReport
from numba_atomflow.validate.report import ProbeResult, Report

_KINDS = ("input_norm", "q", "k", "v", "attention", "after_attention", "ffn_norm", "ffn", "output")


def html_page(report: Report | ReplayReport, title: str) -> bytes:
    """The page, in UTF-8.

    Args:
        report: of a validation or a replay.
        title: such as the model's name.
    """
    title = escape(characters_of_xml(title))
    sections = _replay_sections(report) if isinstance(report, ReplayReport) else _sections(report)
    state = "pass" if report.passed else "fail"
    style = files("numba_atomflow.validate").joinpath("report.css").read_text()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="numba-atomflow validate">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{state.upper()}: {title}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="verdict {state}">{_text(report.verdict())}</p>
{_facts(report)}
{"".join(sections)}</main>
</body>
</html>
""".encode()


def _text(value: str) -> str:
    return escape(characters_of_xml(value))


def _facts(report: Report | ReplayReport) -> str:
    """A list of what was compared with what."""
    facts = [("backend", report.backend)]
    tokens = f"{report.prompt_tokens} of the prompt, {report.decode_steps} of decode steps"
    if isinstance(report, ReplayReport):
        facts += [("runs", str(report.runs)), ("tokens", tokens)]
    else:
        facts += [("reference", report.reference), ("tokens", tokens)]
        facts += [("layers", "each fed the reference's input")] if report.isolated else []
        facts += _logits_facts(report)
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{_text(value)}</dd>" for name, value in facts) + "</dl>"


def _logits_facts(report: Report) -> list[tuple[str, str]]:
    logits = report.logits
    if logits is None:
        return []
    agreement = f"arg-max agrees at {logits.agreed} of {logits.positions} positions"
    if logits.first_disagreement is not None:
        agreement += f", first other at position {logits.first_disagreement}"
    return [("logits", f"{agreement}; KL mean {logits.mean_kl:.2e}, max {logits.max_kl:.2e} nats")]


def _section(heading: str, text: str, *pictures: str) -> str:
    return f"<section><h2>{heading}</h2><p>{text}</p>{''.join(pictures)}</section>\n"


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    return '<p class="key">' + "".join(f'<span class="{style}">{label}</span>' for style, label in entries) + "</p>"


# --- a validation ----------------------------------------------------------------------------------------------------


def _sections(report: Report) -> list[str]:
    sections = [_errors(report), _layers(report)]
    if len(report.position_shares) > 1:
        sections.append(_positions(report))
    return [*sections, _table(report)]


def _errors(report: Report) -> str:
    probes = report.table or report.probes
    series = [
        Series("error", "error", [probe.worst_row_l2 for probe in probes]),
        Series("tolerance", "tolerance", [probe.tolerance for probe in probes]),
    ]
    keys = [("error", "error at the worst position"), ("tolerance", "its tolerance")]
    if _has_added(report):
        series.append(Series("added", "added", [probe.added or 0.0 for probe in probes]))
        keys.append(("added", "added by the op itself, all positions"))
    failed = [place for place, probe in enumerate(probes) if not probe.passed]
    if failed:
        keys.append(("failed", "above its tolerance"))
    chart = log_chart([probe.name for probe in probes], series, failed, "relative L2 error")
    return _section("Errors along the step", "Probes in the order in which a step computes them.", _legend(keys), chart)


def _layers(report: Report) -> str:
    inside = [probe for probe in report.probes if probe.name.startswith("layer.")]
    text = "The largest share of its tolerance that a value uses at any position."
    parts = [heat_legend(), _layer_map(inside, {probe.name: probe.share for probe in inside})]
    if _has_added(report):
        own = {probe.name: probe.added_share or 0.0 for probe in inside}
        parts += [
            "<p>The same where each op was fed the reference's inputs: its own error.</p>",
            _layer_map(inside, own),
        ]
    return _section("Layers", text, *parts)


def _layer_map(probes: Sequence[ProbeResult], shares: dict[str, float]) -> str:
    places = {probe.name: (probe.name.split(".")[2], probe.name.split(".")[1]) for probe in probes}
    cells = {places[name]: Cell(share, f"{name}: {_percent(share)} of its tolerance") for name, share in shares.items()}
    kinds = [kind for kind in _KINDS if any(kind == row for row, _ in cells)]
    return heat_map(kinds, list(dict.fromkeys(column for _, column in places.values())), cells)


def _positions(report: Report) -> str:
    shares = report.position_shares
    prompt = report.prompt_tokens
    series = [Series("share of tolerance", "share", shares), Series("tolerance", "tolerance", [1.0] * len(shares))]
    failed = [place for place, share in enumerate(shares) if not share <= 1]
    names = [f"{place}{'' if place < prompt else ' decode'}" for place in range(len(shares))]
    keys = _legend([("share", "largest share of any probe"), ("tolerance", "the whole tolerance")])
    chart = log_chart(names, series, failed, "share of tolerance", height=200)
    return _section("Positions", f"Positions 0 to {prompt - 1} are the prompt's.", keys, chart)


def _has_added(report: Report) -> bool:
    return any(probe.added is not None for probe in report.probes)


def _table(report: Report) -> str:
    headings = ["probe", "relative L2", "cosine", "worst position", "tolerance", "prefill", "decode"]
    added = _has_added(report)
    if added:
        headings += ["added", "of its tolerance", "inherited"]
    rows = []
    for probe in report.probes:
        cells = [
            f"{probe.relative_l2:.2e}",
            f"{probe.cosine:.9f}",
            f"{probe.worst_row_l2:.2e} at {probe.worst_row}",
            f"{probe.tolerance:.2e}",
            _percent(probe.prefill_share),
            _percent(probe.decode_share) if report.decode_steps else "-",
        ]
        if added:
            cells += [f"{probe.added:.2e}", _percent(probe.added_share or 0.0), f"{probe.inherited:.2e}"]
        rows.append(_row(probe.name, cells, passed=probe.passed))
    return _table_section(headings, rows, "Every probe and stage")


def _row(name: str, cells: Sequence[str], *, passed: bool) -> str:
    data = "".join(f"<td>{cell}</td>" for cell in cells)
    state = "pass" if passed else "fail"
    return f'<tr class="{state}"><th scope="row">{_text(name)}</th>{data}<td class="state">{state.upper()}</td></tr>'


def _table_section(headings: Sequence[str], rows: Sequence[str], heading: str) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in [*headings, ""])
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<section><h2>{heading}</h2><div class="scroll">{table}</div></section>\n'


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 100 else f"{share:.1e} ×"


# --- a replay --------------------------------------------------------------------------------------------------------


def _replay_sections(report: ReplayReport) -> list[str]:
    cells = {}
    for part in report.parts:
        if part.name.startswith("layer."):
            _, layer, kind = part.name.split(".")
            share = part.different / part.elements
            cells[kind, layer] = Cell(2.0 if share else 0.0, f"{part.name}: {share:.1%} of the elements differ")
    layers = list(dict.fromkeys(layer for _, layer in cells))
    text = "Keys and values of the KV cache after the last token; crossed where a run has other bits than the first."
    rows = [
        _row(
            part.name,
            [str(part.elements), str(part.different), "-" if part.position is None else str(part.position)],
            passed=not part.different,
        )
        for part in report.parts
    ]
    return [
        _section("Layers", text, heat_map(["k", "v"], layers, cells)),
        _table_section(["part", "elements", "different", "first position"], rows, "Every part"),
    ]
