"""Pictures of a validation as SVG, to be put into a page: its style sheet has the colours, light and dark."""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import NamedTuple

WIDTH = 960
_LEFT, _RIGHT, _TOP = 64, 16, 12
_PLOT = WIDTH - _LEFT - _RIGHT
_MOST_NAMES = 40  # on an axis; of more, every n-th is written


class Series(NamedTuple):
    """Values over the same places.

    Attributes:
        label: in the legend.
        style: class of the style sheet: "error", "added", "tolerance" or "share".
        values: one per place; values that are not finite are drawn at the upper edge, those of 0 at the lower.
        line: connect them.
    """

    label: str
    style: str
    values: Sequence[float]
    line: bool = True


class Cell(NamedTuple):
    """A field of a map.

    Attributes:
        share: of what is allowed; above 1 it has failed.
        title: shown by the browser under the pointer.
    """

    share: float
    title: str


def log_chart(
    names: Sequence[str], series: Sequence[Series], failed: Iterable[int], y_label: str, *, height: int = 300
) -> str:
    """Series over named places, on a logarithmic axis; places that failed are crossed."""
    finite = [value for each in series for value in each.values if 0 < value < math.inf]
    low = math.floor(math.log10(min(finite, default=1e-9)))
    high = max(math.ceil(math.log10(max(finite, default=1.0))), low + 1)
    bottom = _TOP + height

    def x(place: int) -> float:
        return _LEFT + _PLOT * (place + 0.5) / max(len(names), 1)

    def y(value: float) -> float:
        if not value < math.inf:  # infinite, or not a number
            return _TOP
        return bottom - height * (math.log10(max(value, 10.0**low)) - low) / (high - low)

    parts = []
    step = max(1, (high - low) // 8)
    for exponent in range(low, high + 1, step):
        at = y(10.0**exponent)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 8}" y="{at + 4:.1f}">{_power(exponent)}</text>')
    parts += _names_below(names, x, bottom)
    for each in series:
        points = [(x(place), y(value)) for place, value in enumerate(each.values)]
        if each.line:
            parts.append(f'<polyline class="{each.style}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>')
        if each.style != "tolerance" and len(points) <= 200:
            for (a, b), name, value in zip(points, names, each.values, strict=True):
                title = f"<title>{escape(name)}: {each.label} {value:.3g}</title>"
                parts.append(f'<circle class="{each.style}" cx="{a:.1f}" cy="{b:.1f}" r="2.6">{title}</circle>')
    for place in failed:
        a, b = x(place), y(series[0].values[place])
        cross = f"M{a - 6:.1f} {b - 6:.1f}l12 12m0 -12l-12 12"
        parts.append(f'<path class="failed" d="{cross}"><title>{escape(names[place])} fails</title></path>')
    label = f'<text class="label" transform="translate(14 {_TOP + height / 2}) rotate(-90)">{escape(y_label)}</text>'
    names_height = 16 + 6 * max((len(name) for name in names), default=0) if len(names) > 1 else 20
    return _svg(bottom + min(names_height, 150), [*parts, label])


def heat_map(rows: Sequence[str], columns: Sequence[str], cells: dict[tuple[str, str], Cell]) -> str:
    """Shares of what is allowed, by row and column: the darker, the nearer to the limit; failures in another colour."""
    left = 120
    width = (WIDTH - left - _RIGHT) / max(len(columns), 1)
    height = 20
    parts = []
    for i, row in enumerate(rows):
        top = _TOP + i * height
        parts.append(f'<text class="tick end" x="{left - 8}" y="{top + 14}">{escape(row)}</text>')
        for j, column in enumerate(columns):
            cell = cells.get((row, column))
            if cell is None:
                continue
            shade = "fails" if not cell.share <= 1 else "within"
            opacity = 1.0 if shade == "fails" else _opacity(cell.share)
            parts.append(
                f'<rect class="{shade}" x="{left + j * width + 0.5:.1f}" y="{top + 0.5}" width="{width - 1:.1f}" '
                f'height="{height - 1}" fill-opacity="{opacity:.2f}"><title>{escape(cell.title)}</title></rect>'
            )
            if shade == "fails":  # not by colour alone
                middle = left + (j + 0.5) * width
                parts.append(f'<text class="mark" x="{middle:.1f}" y="{top + 14.5}">×</text>')
    bottom = _TOP + len(rows) * height
    every = -(-len(columns) // _MOST_NAMES) or 1
    parts += [
        f'<text class="tick middle" x="{left + (j + 0.5) * width:.1f}" y="{bottom + 16}">{escape(columns[j])}</text>'
        for j in range(0, len(columns), every)
    ]
    parts.append(f'<text class="label middle" x="{left + (WIDTH - left) / 2}" y="{bottom + 34}">layer</text>')
    return _svg(bottom + 42, parts)


def heat_legend() -> str:
    """What the shades of a heat map mean."""
    parts = []
    for i, share in enumerate((1e-3, 1e-2, 1e-1, 1.0)):
        parts.append(
            f'<rect class="within" x="{i * 96}" y="2" width="16" height="16" fill-opacity="{_opacity(share):.2f}"/>'
            f'<text class="tick" x="{i * 96 + 22}" y="15">{share:.1%}</text>'
        )
    parts.append('<rect class="fails" x="384" y="2" width="16" height="16"/><text class="mark" x="392" y="15">×</text>')
    parts.append('<text class="tick" x="406" y="15">above its tolerance</text>')
    return f'<svg class="legend" viewBox="0 0 560 20" width="560" height="20" role="img">{"".join(parts)}</svg>'


def _opacity(share: float) -> float:
    """0.06 for a thousandth of a tolerance or less, 1 for all of it, evenly by powers of ten."""
    return 0.06 + 0.94 * min(max((math.log10(max(share, 1e-3)) + 3) / 3, 0.0), 1.0)


def _names_below(names: Sequence[str], x: Callable[[int], float], bottom: float) -> list[str]:
    every = -(-len(names) // _MOST_NAMES) or 1
    return [
        f'<text class="tick end" transform="translate({x(place) + 4:.1f} {bottom + 8}) rotate(-90)">'
        f"{escape(names[place])}</text>"
        for place in range(0, len(names), every)
    ]


def _power(exponent: int) -> str:
    return f'10<tspan dy="-5" font-size="8">{exponent}</tspan>'


def _svg(height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(parts)}</svg>'
