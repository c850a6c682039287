"""Documents name only what exists: links, anchors, pictures, files; and their lines are wrapped.

`python tests/cpu/test_docs.py` lists every fault, one a line.
"""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from repository_files import ROOT, tracked_files
from typer.main import get_command

from numba_atomflow.cli.app import app

WIDTH = 120
FILES = tracked_files()
NAMES = {path.relative_to(ROOT).as_posix() for path in FILES}
FOLDERS = {parent.as_posix() for name in NAMES for parent in Path(name).parents} - {"."}
DOCUMENTS = [path for path in FILES if path.suffix == ".md"]
PRESENT = [path for path in DOCUMENTS if path.name != "CHANGELOG.md" and path.parent.name != "lab"]  # no logs
SOURCES = [path for path in FILES if path.suffix in {".py", ".toml", ".sh"} or path.name == "run"]
LOG = "docs/lab/"  # names of files there are those of their time
MADE_UP = {"tests/cpu/test_x.py", "tests/sim/test_y.py"}  # names that tests give as arguments

# A path from the root of the repository, in prose or code; not one inside an address or a longer path.
FROM_ROOT = re.compile(
    r"(?<![\w./~:-])((?:docs|scripts|tests|ops|memory|validate|numba_atomflow|\.ci)/[\w./-]*\.(?:py|md|sh|svg|png))(?![\w/])"
)
IN_BACKTICKS = re.compile(r"`([\w.-]+(?:/[\w.-]+)*/?)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|<img[^>]*\bsrc=\"([^\"]+)\"|<source[^>]*\bsrcset=\"([^\"]+)\"")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def blank(text: str) -> str:
    """`text` with its code blocks emptied; lines keep their numbers."""
    return FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)


def exists(reference: str, *, beside: str = "") -> bool:
    """Whether a file or folder has this path, or a path that ends so: `pipeline.py` in a list about one folder."""
    name = reference.rstrip("/")
    known = NAMES | FOLDERS
    return name in known or f"{beside}/{name}" in known or any(each.endswith(f"/{name}") for each in known)


def is_path(reference: str) -> bool:
    """Whether text in backticks names a file or folder of the repository.

    Data files of users (`config.json`, `roofline.svg`) and names of the hub (`org/name`) are none.
    """
    first, *rest = reference.split("/")
    return reference.endswith((".py", ".sh", ".md")) or (first in FOLDERS and bool(rest))


def anchors(document: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", blank(document.read_text()), re.MULTILINE)
    found: set[str] = set()
    for heading in headings:
        anchor = re.sub(r"[^\w -]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        number = next(n for n in range(len(headings)) if (f"{anchor}-{n}" if n else anchor) not in found)
        found.add(f"{anchor}-{number}" if number else anchor)
    return found


def line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def dead_links(document: Path) -> Iterator[str]:
    text = blank(document.read_text())
    for match in LINK.finditer(text):
        target = next(group for group in match.groups() if group)
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.exists():
            yield f"{line_of(text, match.start())}: link to {target}: no such file"
        elif anchor and anchor not in anchors(file):
            yield f"{line_of(text, match.start())}: link to {target}: no such heading"


def dead_paths(file: Path) -> Iterator[str]:
    """Paths from the root anywhere in a file, and text in a document's backticks that looks like a path."""
    text = file.read_text()
    for match in FROM_ROOT.finditer(text):
        if not exists(match[1]) and match[1] not in MADE_UP:
            yield f"{line_of(text, match.start())}: {match[1]}: no such file"
    if file.suffix == ".md":
        for match in IN_BACKTICKS.finditer(text):
            if is_path(match[1]) and not exists(match[1], beside=file.parent.relative_to(ROOT).as_posix()):
                yield f"{line_of(text, match.start())}: `{match[1]}`: no such file"


def long_lines(document: Path) -> Iterator[str]:
    """Lines of prose beyond the width: tables, images, URLs and text in backticks do not count."""
    for number, line in enumerate(blank(document.read_text()).splitlines(), 1):
        prose = re.sub(r"`[^`]*`|\]\([^)]*\)", "", line)
        if len(prose) > WIDTH and not line.lstrip().startswith(("|", "<", "![")):
            yield f"{number}: {len(prose)} characters"


def faults(file: Path) -> list[str]:
    name = file.relative_to(ROOT).as_posix()
    found: list[str] = []
    if file.suffix == ".md":
        found += [*dead_links(file), *long_lines(file)]
    if not name.startswith(LOG) and file != Path(__file__):
        found += dead_paths(file)
    return [f"{name}:{fault}" for fault in found]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_anchors_pictures_and_files_exist_and_lines_are_wrapped(document: Path) -> None:
    assert faults(document) == []


def test_documents_and_files_that_code_names_exist() -> None:
    assert [fault for source in SOURCES for fault in faults(source)] == []


def test_every_picture_of_the_documents_is_shown_somewhere() -> None:
    shown = "\n".join(document.read_text() for document in DOCUMENTS)
    pictures = [path.name for path in FILES if path.suffix in {".png", ".svg"} and path.is_relative_to(ROOT / "docs")]
    assert [name for name in pictures if name not in shown] == []


COMMAND = re.compile(r"numba-atomflow (sandbox |batch )?([a-z-]+)((?: [^`#|\n]*)?)")
SCRIPT = re.compile(r"(?:python|bash) (scripts/\w+\.(?:py|sh))([^`#|\n]*)")
OPTION = re.compile(r"(?<= )-{1,2}[a-z][a-z-]*")


def wrong_commands(text: str) -> Iterator[str]:
    """Commands and options in `text` that the command line does not have."""
    commands: Any = get_command(app)
    for match in COMMAND.finditer(text):
        group = commands.commands[match[1].strip()] if match[1] else commands
        if match[2] not in group.commands:
            yield f"{match[0]}: no such command"
            continue
        parameters = group.commands[match[2]].params
        options = {name for each in parameters for name in (*each.opts, *each.secondary_opts)} | {"--help"}
        yield from (f"{match[0]}: no option {option}" for option in OPTION.findall(match[3]) if option not in options)
    for match in SCRIPT.finditer(text):
        source = (ROOT / match[1]).read_text()
        yield from (f"{match[0]}: no option {option}" for option in OPTION.findall(match[2]) if option not in source)


@pytest.mark.parametrize("document", PRESENT, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_and_their_options_exist(document: Path) -> None:
    assert list(wrong_commands(document.read_text())) == []


def test_a_wrong_command_or_option_is_found() -> None:
    text = (
        "`numba-atomflow bench --depths 0 --no-such`, numba-atomflow sandbox walk, `bash scripts/test.sh --everything`"
    )
    assert [fault.rsplit(": ")[-1] for fault in wrong_commands(text)] == [
        "no option --no-such",
        "no such command",
        "no option --everything",
    ]


def test_the_list_of_packages_has_the_layers_of_the_import_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [{name.strip("() ") for name in layer.split("|")} for layer in contracts[0]["layers"]]
    table = re.search(r"^\| package \|.*?\n\n", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)
    assert table
    rows = [set(re.findall(r"`(\w+)`", row.split("|")[1])) for row in table[0].splitlines()[2:] if row]
    assert rows == [layer for layer in layers if layer != {"__main__"}]


if __name__ == "__main__":
    for file in [*DOCUMENTS, *SOURCES]:
        for fault in faults(file):
            print(fault)
