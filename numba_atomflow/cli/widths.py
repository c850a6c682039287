"""``numba-atomflow validate --widths``: steps of several tokens against decode steps."""

import re
from collections.abc import Sequence

from numba_atomflow.cli import options, output
from numba_atomflow.errors import OptionError
from numba_atomflow.files.untrusted import quote


def parse_widths(text: str) -> list[int]:
    """Numbers of tokens, separated by commas.

    Raises:
        OptionError: the text has another form.
    """
    if re.fullmatch(r"\d{1,4}(,\d{1,4})*", text) is None:
        raise OptionError(f"--widths {quote(text)} is no list of numbers; give for example --widths 1,2,4,8.")
    return [int(width) for width in text.split(",")]


def show_widths(
    model: str, prompt: Sequence[int], widths: Sequence[int], engine_options: options.EngineOptions, *, as_json: bool
) -> bool:
    """Compare, and show the result; returns whether the bits are the same."""
    from numba_atomflow.validate import check_widths
    from numba_atomflow.validate.widths import POSITIONS

    with engine_options.load(model, len(prompt) + POSITIONS) as engine, output.steps_bar() as progress:
        report = check_widths(engine.backend, engine.geometry, prompt, widths, progress)
    if as_json:
        output.emit_json(report.to_dict())
    else:
        output.emit(f"{report.backend}: {report.positions} positions after {report.prompt_tokens} prompt tokens\n")
        output.emit(f"{report.verdict()}\n")
    return report.passed
