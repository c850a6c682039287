"""JUnit and HTML files of validations and replays: well-formed, complete, and safe with hostile names."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from tiny_models import SMALLEST_VOCABULARY, tiny_geometry, write_hf_folder

from numba_atomflow import Engine
from numba_atomflow.convert import convert
from numba_atomflow.validate import (
    Reference,
    ReplayedPart,
    ReplayReport,
    Report,
    SignFlip,
    check,
    html_page,
    junit_xml,
    record,
)
from numba_atomflow.validate.pictures import Cell, Series, heat_map, log_chart

GEOMETRY = tiny_geometry(layers=3, vocabulary=SMALLEST_VOCABULARY)
PROMPT = np.random.default_rng(0).integers(3, SMALLEST_VOCABULARY, 20).tolist()
HOSTILE = 'x"><script>alert(1)</script>\x1b[2J&amp;'
PROBES = 1 + 3 * 9 + 1 + 2  # `mlp` is one of the first layer only


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("reports")
    write_hf_folder(folder / "hf", GEOMETRY)
    path: Path = convert(folder / "hf", folder / "tiny.safetensors")
    with Engine.load(path, "cpu", 64, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(engine: Engine) -> Reference:
    return record(engine.backend, GEOMETRY, PROMPT, 4, block=1)


@pytest.fixture(scope="module")
def passed(engine: Engine, reference: Reference) -> Report:
    return check(engine.backend, reference, added=True)


@pytest.fixture(scope="module")
def failed(engine: Engine, reference: Reference) -> Report:
    return check(engine.backend, reference, added=True, observers=[SignFlip("layer.1.attention")])


def replayed(different: int) -> ReplayReport:
    parts = [ReplayedPart("layer.0.k", 100, different, 3 if different else None, 2 if different else None)]
    return ReplayReport("cpu (<b>)", 20, 4, 2, [*parts, ReplayedPart("layer.0.v", 100), ReplayedPart("tokens", 24)])


class Page(HTMLParser):
    """What a page holds: tags with their attributes, and the text."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


# --- JUnit -----------------------------------------------------------------------------------------------------------


def test_junit_has_a_case_for_each_probe_and_for_the_verdict(passed: Report) -> None:
    suites = ET.fromstring(junit_xml(passed, "tiny"))
    (suite,) = suites
    cases = suite.findall("testcase")
    assert len(cases) == PROBES + 1 == int(suite.get("tests", ""))
    assert {case.get("classname") for case in cases} == {"validate.model", *(f"validate.layer.{i}" for i in range(3))}
    assert suites.get("failures") == suite.get("failures") == "0"
    assert not suite.findall(".//failure")
    properties = {entry.get("name"): entry.get("value") for entry in suite.findall("properties/property")}
    assert properties["reference"] == "cpu backend, token by token"


def test_junit_names_what_failed_and_why(failed: Report) -> None:
    (suite,) = ET.fromstring(junit_xml(failed, "tiny"))
    cases = [case for case in suite.findall("testcase") if case.find("failure") is not None]
    assert len(cases) == int(suite.get("failures", "")) == sum(not probe.passed for probe in failed.probes) + 1
    assert (cases[0].get("classname"), cases[0].get("name")) == ("validate.layer.1", "attention")
    failure = cases[0].find("failure")
    assert failure is not None
    assert re.fullmatch(
        r"relative L2 \S+ at position \d+, tolerance \S+ \(op layer.1.attention\)", failure.get("message", "")
    )
    assert cases[-1].get("name") == "verdict"


@pytest.mark.parametrize("different", [0, 7])
def test_junit_of_a_replay(different: int) -> None:
    (suite,) = ET.fromstring(junit_xml(replayed(different), "tiny"))
    assert len(suite.findall("testcase")) == 4
    failures = [entry.get("message") for entry in suite.findall(".//failure")]
    assert len(failures) == (2 if different else 0)
    assert not different or failures[0] == "run 2 differs from run 1 from position 3 on"


# --- HTML ------------------------------------------------------------------------------------------------------------


def test_a_page_shows_verdict_pictures_and_every_probe(passed: Report, failed: Report) -> None:
    for report, state in ((passed, "PASS"), (failed, "FAIL")):
        page = html_page(report, "tiny")
        content = Page(page)
        assert report.verdict() in content.text
        assert f"{state}: tiny" in content.text
        assert sum(tag == "svg" for tag, _ in content.tags) == 5  # errors, legend, two maps, positions
        for probe in report.probes:
            assert f'<th scope="row">{probe.name}</th>' in page.decode()
        assert page.decode().count('<tr class="fail">') == sum(not probe.passed for probe in report.probes)


def test_only_the_op_at_fault_is_marked_in_the_map_of_own_errors(failed: Report) -> None:
    _, own = [part for part in html_page(failed, "tiny").decode().split("<svg ") if 'class="within"' in part][1:3]
    assert re.findall(r'class="fails".*?<title>(.*?):', own) == ["layer.1.attention"]


def test_every_picture_is_well_formed_and_names_its_values(passed: Report, failed: Report) -> None:
    for report in (passed, failed):
        pictures = re.findall(r"<svg .*?</svg>", html_page(report, "tiny").decode(), re.DOTALL)
        for picture in pictures:
            ET.fromstring(picture)
            assert "nan" not in picture
            assert "inf" not in picture.replace("infinite", "")
        assert f"layer.0.q: {report.probes[2].share:.1%} of its tolerance" in pictures[2]


def test_a_page_needs_nothing_from_elsewhere_and_runs_nothing(failed: Report) -> None:
    content = Page(html_page(failed, "tiny"))
    assert {tag for tag, _ in content.tags}.isdisjoint({"script", "link", "img", "iframe"})
    assert not any(name in {"src", "href", "onload"} for _, attributes in content.tags for name in attributes)
    policy = next(attributes for tag, attributes in content.tags if attributes.get("http-equiv"))
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert "@media (prefers-color-scheme: dark)" in content.text


@pytest.mark.parametrize("hostile", [HOSTILE, "\x00", "é" * 300, "\udcff \ufffe"])
def test_hostile_names_stay_text(passed: Report, hostile: str) -> None:
    report = Report(**{name: getattr(passed, name) for name in passed.__dataclass_fields__} | {"reference": hostile})
    content = Page(html_page(report, hostile))
    assert not any(tag == "script" for tag, _ in content.tags)
    assert "\x1b" not in content.text
    ET.fromstring(junit_xml(report, hostile))


def test_values_that_are_not_finite_have_a_place(engine: Engine, reference: Reference) -> None:
    class NotANumber:
        def before(self, op: object, memory: object) -> None:
            """No effect."""

        def after(self, op: object, memory: object) -> None:
            if getattr(op, "name", "") == "layer.1.gate_up":
                memory.write(op.y, np.full(op.y.shape, np.nan, np.float32))  # type: ignore[attr-defined]

    report = check(engine.backend, reference, observers=[NotANumber()])
    page = html_page(report, "tiny").decode()
    for picture in re.findall(r"<svg .*?</svg>", page, re.DOTALL):
        ET.fromstring(picture)
        assert not re.search(r'(x|y|cx|cy|points|d)="[^"]*(nan|inf)', picture)
    ET.fromstring(junit_xml(report, "tiny"))


@pytest.mark.parametrize("different", [0, 7])
def test_a_page_of_a_replay(different: int) -> None:
    report = replayed(different)
    page = html_page(report, "tiny")
    assert report.verdict() in Page(page).text
    assert page.decode().count('class="fails"') == (1 if different else 0)
    assert "cpu (<b>)" in Page(page).text


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[0.0], [1e-30, 1e30], [float("inf"), 1.0], [3.0] * 500])
def test_a_chart_takes_any_values(values: list[float]) -> None:
    chart = log_chart([str(i) for i in range(len(values))], [Series("e", "error", values)], [0], "error")
    ET.fromstring(chart)
    numbers = [float(number) for pair in re.findall(r'points="(.*?)"', chart) for number in re.split(r"[ ,]", pair)]
    assert len(numbers) == 2 * len(values)
    assert min(numbers) >= 0
    assert max(numbers) <= 960


def test_a_map_leaves_out_what_was_not_compared() -> None:
    picture = heat_map(["q", "k"], ["0", "1"], {("q", "0"): Cell(0.5, "half"), ("k", "1"): Cell(2.0, "<twice>")})
    root = ET.fromstring(picture)
    rectangles = root.findall("rect")
    assert [rectangle.get("class") for rectangle in rectangles] == ["within", "fails"]
    titles = [title.text for title in root.iter("title")]
    assert titles == ["half", "<twice>"]
