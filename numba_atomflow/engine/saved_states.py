"""Copies of the KV cache, in memory and in files."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from numba_atomflow.checkpoint.fingerprint import ModelIdentity, identify
from numba_atomflow.engine.core import EngineCore, Message
from numba_atomflow.errors import OptionError
from numba_atomflow.files.destination import check_destination_in_folder
from numba_atomflow.files.untrusted import quote
from numba_atomflow.state.snapshot import KvSnapshot, check_fits, put_snapshot, take_snapshot
from numba_atomflow.state.state_file import StateFile, write_state
from numba_atomflow.utils.arguments import file_path, truth_value
from numba_atomflow.utils.progress import Progress


class SavedStates(EngineCore):
    """The calls of `Engine` that copy and replace the KV cache."""

    @cached_property
    def _identity(self) -> ModelIdentity:
        return identify(self.checkpoint)

    def snapshot(self) -> KvSnapshot:
        """Copy what the KV cache holds to host memory. A generation in progress goes on afterwards.

        Within `edit`, this is the way to keep what was computed under the edits.

        Raises:
            CheckpointError: the model's file was changed by another program.
        """
        return self._calls.run(lambda: take_snapshot(self._open_context(), self.geometry, self._identity))

    def restore(self, snapshot: KvSnapshot) -> None:
        """Replace what the KV cache holds by a snapshot of it, or of a prefix of it (`KvSnapshot.prefix`).

        The snapshot is of this model, in the KV format of this backend: float32 on the CPU, float16 on a GPU. Then the
        next tokens are those that followed when it was taken. A generation in progress ends here.

        Raises:
            StateError: the snapshot is of another model or KV format.
            ContextError: it has more tokens than the KV cache has positions.
            OptionError: it is no snapshot.
        """
        if not isinstance(snapshot, KvSnapshot):
            raise OptionError(f"snapshot is {quote(snapshot)}; give what Engine.snapshot has returned.")

        def restore() -> None:
            context = self._open_context()
            check_fits(snapshot, context, self.geometry, self._identity)
            self._end_generation()
            put_snapshot(snapshot, context)

        self._calls.run(restore)

    def save_state(
        self,
        path: str | Path,
        messages: Sequence[Message] = (),
        *,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Write what the KV cache holds to a file, which appears complete or not at all.

        Args:
            path: of the file, a safetensors file.
            messages: the conversation that led to it, to be stored with it.
            overwrite: replace a file that exists.
            progress: called with bytes done and bytes in all.

        Raises:
            DestinationError: the file exists, or cannot be written.
            OptionError: the messages are not plain data.
        """
        file = file_path("path", path)
        overwrite = truth_value("overwrite", overwrite)
        check_destination_in_folder(file, overwrite)
        write_state(file, self.snapshot(), messages, overwrite, progress)

    def load_state(self, path: str | Path, progress: Progress | None = None) -> list[dict[str, Any]]:
        """Replace what the KV cache holds by what `save_state` wrote; the conversation that was stored with it.

        As `restore`, of the same model and backend; until the file has been checked, nothing changes.

        Raises:
            StateError: the file is missing, damaged, or of another model or KV format.
            ContextError: it has more tokens than the KV cache has positions.
        """
        file = file_path("path", path)

        def load() -> list[dict[str, Any]]:
            context = self._open_context()
            with StateFile(file) as state:
                check_fits(state.snapshot, context, self.geometry, self._identity, str(file))
                state.verify(progress)
                messages = state.messages()
                self._end_generation()
                state.restore(context)
            return messages

        return self._calls.run(load)
