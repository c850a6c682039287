"""Text input: UTF-8 in every locale, byte order marks, errors for other encodings."""

import codecs
import io
import sys
from pathlib import Path

import pytest

from numba_atomflow import home
from numba_atomflow.errors import TextError
from numba_atomflow.files import text_input
from numba_atomflow.files.text_input import as_unicode, decode_text, read_line, read_standard_input, read_text_file

TEXT = "Grüße aus Köln. 你好"


def refused(what: str, read: object, *arguments: object) -> None:
    with pytest.raises(TextError) as caught:
        read(*arguments)  # type: ignore[operator]
    assert what in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_byte_order_mark_is_removed(tmp_path: Path) -> None:
    (tmp_path / "bom.txt").write_bytes(codecs.BOM_UTF8 + TEXT.encode())
    assert read_text_file(tmp_path / "bom.txt") == TEXT
    assert decode_text(TEXT.encode(), "It") == TEXT
    assert decode_text(f"a\ufeff{TEXT}".encode(), "It") == f"a\ufeff{TEXT}"  # elsewhere it is a character


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_other_encodings_are_named(encoding: str) -> None:
    data = f"\ufeff{TEXT}".encode(encoding) if encoding.endswith("be") else TEXT.encode(encoding)
    refused(f"It is {encoding[:6].upper()}, not UTF-8", decode_text, data, "It")


def test_files_that_are_not_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"Gr\xfc")
    refused(f"The prompt file {latin} is not UTF-8 text (byte 2)", read_text_file, latin, "The prompt file")
    refused("(Is a directory)", read_text_file, tmp_path)
    refused("(No such file", read_text_file, tmp_path / "none")
    monkeypatch.setattr(text_input, "MOST_BYTES", 1 << 20)
    refused("/dev/zero has more than 1 MiB", read_text_file, Path("/dev/zero"))


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="latin-1"))

    give(codecs.BOM_UTF8 + TEXT.encode())
    assert read_standard_input() == TEXT
    give(codecs.BOM_UTF8 + f"{TEXT}\n\ufeff{TEXT}\r\n\n".encode())
    lines = [read_line(first=True), *(read_line(first=False) for _ in range(3))]
    assert lines == [f"{TEXT}\n", f"\ufeff{TEXT}\r\n", "\n", ""]
    give(b"\xff\xfeh\0i\0")
    refused("Standard input is UTF-16", read_line, True)
    give(b"good\nGr\xfc\n")
    assert read_line(first=True) == "good\n"
    refused("Standard input is not UTF-8", read_line, False)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
def test_arguments_are_utf8_in_every_locale(encoding: str) -> None:
    taken = TEXT.encode().decode(encoding, "surrogateescape")  # as Python takes an argument
    assert as_unicode(taken, "The prompt", encoding) == TEXT


def test_arguments_in_the_encoding_of_the_locale() -> None:
    assert as_unicode(b"Gr\xfc\xdfe".decode("latin-1"), "The prompt", "latin-1") == "Grüße"
    for encoding in ("ascii", "utf-8"):
        taken = b"Gr\xfc".decode(encoding, "surrogateescape")
        refused("--stop is not UTF-8 text (byte 2)", as_unicode, taken, "--stop", encoding)
    assert as_unicode(TEXT, "The prompt", "latin-1") == TEXT  # never was in that encoding


def test_expand_user() -> None:
    """`Path.expanduser` raises for a file that is called ~draft; `home.expand_user` keeps the name, as a shell does."""
    assert home.expand_user("~no-such-user/x") == Path("~no-such-user/x")
    assert home.expand_user("~/x") == Path.home() / "x"
    package = Path(home.__file__).parent
    users = [path.name for path in package.rglob("*.py") if ".expanduser(" in path.read_text(encoding="utf-8")]
    assert users == ["home.py"]
