"""Fixtures of the command-line tests."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from cli_runner import InProcess
from terminals import Terminal
from tiny_models import write_hf_folder

from numba_atomflow import home
from numba_atomflow.convert import convert


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> InProcess:
    """Run a command line in this process."""
    return InProcess(capsys)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a tiny random model; not to be changed."""
    folder = tmp_path_factory.mktemp("tiny") / "hf"
    write_hf_folder(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_folder: Path) -> Path:
    """The same model as a checkpoint; not to be changed."""
    return convert(tiny_folder, tiny_folder.parent / "tiny.safetensors")


@pytest.fixture(scope="session")
def cli_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with no models, that shares compiled code with this process."""
    folder = tmp_path_factory.mktemp("home")
    home.compiled().mkdir(parents=True, exist_ok=True)
    (folder / "compiled").symlink_to(home.compiled().resolve())
    return folder


@pytest.fixture(scope="session")
def smollm2_home(cli_home: Path, smollm2_checkpoint: Path) -> Path:
    """A home whose models folder holds the default model."""
    (cli_home / "models").mkdir()
    (cli_home / "models" / "smollm2-135m-instruct.safetensors").symlink_to(smollm2_checkpoint)
    return cli_home


@pytest.fixture
def at_terminal() -> Iterator[Callable[..., Terminal]]:
    """Start commands at terminals; what is still running when the test ends is killed."""
    with ExitStack() as open_terminals:
        yield lambda *arguments: open_terminals.enter_context(closing(Terminal(*arguments)))
