"""Names that scripts import: the public API, and packages that import their modules at first use."""

from importlib import import_module

import pytest

import numba_atomflow
from numba_atomflow import validate


@pytest.mark.parametrize("name", numba_atomflow.__all__)
def test_the_public_api(name: str) -> None:
    assert getattr(numba_atomflow, name) is not None


@pytest.mark.parametrize("name", validate.__all__)
def test_the_validation_api(name: str) -> None:
    assert getattr(validate, name) is not None


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("backends", ["cpu"]),
        ("checkpoint", ["Checkpoint", "CheckpointWriter", "fusion"]),
        ("convert", ["convert"]),
        ("geometry", ["ModelGeometry"]),
        ("home", ["home", "models", "downloads", "compiled"]),
        ("sources", ["open_source"]),
        ("sources.gguf_tokenizer", ["assets_from_gguf"]),
        ("text", ["ChatTemplate", "TextAssets", "TextCodec"]),
    ],
)
def test_names_of_packages(module: str, names: list[str]) -> None:
    package = import_module(f"numba_atomflow.{module}")
    if module == "backends":
        import_module("numba_atomflow.backends.cpu")  # a module, which an import of the package does not load
    for name in names:
        assert hasattr(package, name), name


@pytest.mark.parametrize("module", ["checkpoint", "text"])
def test_an_unknown_name_raises_attribute_error(module: str) -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        import_module(f"numba_atomflow.{module}").no_such_name  # noqa: B018
