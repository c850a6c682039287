"""Words that the project replaced by the field's own do not come back (docs/glossary.md, CONTRIBUTING.md).

`python tests/cpu/test_language.py` lists every place, one a line.
"""

import re
from collections.abc import Iterator

import pytest
from repository_files import ROOT, tracked_files

# What is written instead. The test reads code, comments, messages and documents. A phrase that is broken over two
# comment lines, or spelt with underscores in a name, counts as well.
INSTEAD = {
    "copy engine": "TMA (bulk copies)",
    "multiprocessor": "SM",
    "first-level cache": "L1",
    "second-level cache": "L2",
    "life and death": "lifecycle",
    "gives up waiting": "the watchdog trips",
    "computes no numbers": "NaN or Inf",
    "surplus column": "padding token",
    "dealt": "scheduled, assigned",
    "dealing": "schedule",
    "the house": "project, repository",
    "rooms": "packages",
    "word with an epoch": "flagged word (LL protocol)",
    "halves apart": "split_rows",
    "fragment order": "prepacked",
    "hardware fp8": "WeightFormat.converter",
    "rotates apart": "separate_rope_kernel",
    "vocabulary projection": "LM head",
    "in the making": "in progress",
    "hand over": "post, pass",
    "handed over": "posted, passed",
    "nobody": "no thread, no caller, ...",
    "whoever": "the thread that, the caller that, ...",
    "two lives": "PTX on the device, Python in the simulator",
    "looks at a word": "polls",
    "asked for ahead": "prefetched (L2)",
}

# Where a word is data, not language: (file, word).
DATA = {
    ("numba_atomflow/perf/bench.py", "copy engine"),  # a key in reports of earlier versions
    ("tests/cpu/test_bench.py", "copy engine"),
    ("scripts/ptx_dump.py", "multiprocessor"),  # a name in the tests of earlier commits
}

# What was written at the time, and what other tools wrote, stays. Of the changelog the newest section is read.
LOGS = ("docs/lab/", "tests/recorded/")
THIS_FILE = "tests/cpu/test_language.py"


def pattern(phrase: str) -> re.Pattern[str]:
    """`phrase` in any case, its plural too, its words apart by blanks, line breaks, comment signs, `-` or `_`.

    CUDA's own constants keep their names: MULTIPROCESSOR_COUNT, MAX_THREADS_PER_MULTIPROCESSOR.
    """
    words = r"[\s#*>|_-]+".join(map(re.escape, re.split("[ -]", phrase)))
    return re.compile(rf"(?<![A-Za-z])(?<!PER_){words}s?(?!_COUNT)(?![A-Za-z])", re.IGNORECASE)


PATTERNS = {phrase: pattern(phrase) for phrase in INSTEAD}


def places(text: str) -> Iterator[tuple[int, str]]:
    """Line and banned word of each place in `text`."""
    lower = text.lower()
    for phrase, expression in PATTERNS.items():
        if re.split("[ -]", phrase)[0] not in lower:  # most files: a search of the whole text is ten times as slow
            continue
        for match in expression.finditer(text):
            yield text.count("\n", 0, match.start()) + 1, phrase


def newest_section(changelog: str) -> str:
    """The last `###` section before the first release, after as many line breaks as there are before it."""
    unreleased = re.split(r"(?m)^## \d", changelog)[0]
    before, heading, section = unreleased.rpartition("\n### ")
    return "\n" * before.count("\n") + section if heading else ""


def banned() -> list[str]:
    """Every place in the repository, as `file:line: word (instead)`."""
    found = []
    for path in tracked_files():
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(LOGS) or name == THIS_FILE:
            continue
        if any(expression.search(name) for expression in PATTERNS.values()):
            found.append(f"{name}: its name")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a picture
            continue
        if name == "CHANGELOG.md":
            text = newest_section(text)
        found += [
            f"{name}:{line}: {phrase} ({INSTEAD[phrase]})"
            for line, phrase in sorted(places(text))
            if (name, phrase) not in DATA
        ]
    return found


def test_no_banned_word_is_in_code_comments_or_documents() -> None:
    assert banned() == []


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("the copy\n    # engine", "copy engine"),
        ("COPY_ENGINE = 1", "copy engine"),
        ("chip.multiprocessors", "multiprocessor"),
        ("Second-level\ncaches", "second-level cache"),
        ("rooms of the project", "rooms"),
    ],
)
def test_a_banned_word_is_found_across_lines_and_in_names(text: str, word: str) -> None:
    assert word in {phrase for _, phrase in places(text)}


@pytest.mark.parametrize(
    "text",
    [
        "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT",
        "MAX_THREADS_PER_MULTIPROCESSOR",
        "mushrooms",
        "an ordeal",
        "ideally",
        "multiprocessing",
    ],
)
def test_names_of_cuda_and_other_words_are_left_alone(text: str) -> None:
    assert list(places(text)) == []


if __name__ == "__main__":
    for place in banned():
        print(place)
