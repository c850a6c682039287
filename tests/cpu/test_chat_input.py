"""The editor of the chat's /edit."""

import signal
from pathlib import Path

import pytest

from numba_atomflow.cli.chat_input import edit_text


def editor(folder: Path, script: str) -> Path:
    path = folder / "editor"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_ctrl_c_in_the_editor_is_the_editor_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal sends it to all programs in the foreground: here, the editor itself and the one that started it."""
    script = 'trap "printf changed >\\"$1\\"" INT; kill -INT $PPID; kill -INT $$'
    monkeypatch.setenv("VISUAL", str(editor(tmp_path, script)))
    assert edit_text("before") == "changed"
    with pytest.raises(KeyboardInterrupt):  # afterwards it is this program's again
        signal.raise_signal(signal.SIGINT)
