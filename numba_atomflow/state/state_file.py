"""State files: a snapshot of the KV cache as one safetensors file, with the conversation that led to it, if any.

Tensors: keys and values, F32 or F16 [layers, tokens, kv_heads, head_dim]; token_ids, I32 [tokens]; messages, U8, a JSON
list in OpenAI's shape, only for a conversation. Metadata, all strings: format, format_version, model (JSON: name and
fingerprint) and sha256 (of these tensors' bytes, in this order).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.checkpoint.fingerprint import ModelIdentity
from numba_atomflow.checkpoint.safetensors import TensorFile, file_head, read_tensor_file
from numba_atomflow.checkpoint.writer import write_failure
from numba_atomflow.context import Context
from numba_atomflow.errors import DestinationError, OptionError, StateError
from numba_atomflow.files.atomic import write_pieces
from numba_atomflow.files.destination import destination_exists
from numba_atomflow.files.text_input import MOST_BYTES
from numba_atomflow.files.untrusted import load_json, quote, short
from numba_atomflow.memory.mapped_file import MappedFile
from numba_atomflow.state.snapshot import KvSnapshot, put_snapshot
from numba_atomflow.utils.json_text import json_text
from numba_atomflow.utils.progress import Progress

FORMAT = "numba-atomflow KV cache"
FORMAT_VERSION = "1"

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype(np.uint8),
}
_TENSORS = {  # in the order of the file: possible dtypes, and the number of dimensions
    "keys": (("F32", "F16"), 4),
    "values": (("F32", "F16"), 4),
    "token_ids": (("I32",), 1),
    "messages": (("U8",), 1),
}
_ADVICE = "save it again"
_PIECE_BYTES = 1 << 24  # that are written, or checked, at once


# --- writing --------------------------------------------------------------------------------------------------------


def write_state(
    path: Path, snapshot: KvSnapshot, messages: Sequence[Mapping[str, Any]], overwrite: bool, progress: Progress | None
) -> None:
    """Write a state file; it appears under its name complete, or not at all.

    Raises:
        DestinationError: the file exists and `overwrite` is False, or it cannot be written.
        OptionError: the messages are not plain data.
    """
    tensors = {
        "keys": snapshot.keys,
        "values": snapshot.values,
        "token_ids": np.array(snapshot.token_ids, _DTYPES["I32"]),
    }
    if messages:
        tensors["messages"] = np.frombuffer(_json(messages).encode(), np.uint8)
    digest = hashlib.sha256()
    for piece in _reported("hashing", tensors, progress):
        digest.update(piece)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": json.dumps(snapshot.model._asdict()),
        "sha256": digest.hexdigest(),
    }
    names = {dtype: name for name, dtype in _DTYPES.items()}
    head = file_head({name: (names[array.dtype], array.shape) for name, array in tensors.items()}, metadata)

    def pieces() -> Iterator[bytes | memoryview]:
        yield head
        yield from _reported("writing", tensors, progress)

    try:
        write_pieces(path, pieces(), replace=overwrite)
    except FileExistsError as error:
        raise destination_exists(path) from error
    except OSError as error:
        raise DestinationError(write_failure(path, error)) from error


def _json(messages: Sequence[Mapping[str, Any]]) -> str:
    try:
        return json_text(list(messages))
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"messages cannot be stored ({short(str(error))}); give plain data.") from error


def _reported(what: str, tensors: Mapping[str, NDArray[Any]], progress: Progress | None) -> Iterator[memoryview]:
    """The bytes of all tensors, in pieces."""
    done, total = 0, sum(array.nbytes for array in tensors.values())
    for array in tensors.values():
        for piece in _pieces(array):
            if progress:
                progress(what, done, total)
            yield piece
            done += len(piece)
    if progress:
        progress(what, total, total)


def _pieces(array: NDArray[Any]) -> Iterator[memoryview]:
    """An array's bytes in C order; only one layer is copied at a time where they are apart."""
    for part in array if array.ndim > 1 else (array,):
        data = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        for start in range(0, len(data), _PIECE_BYTES):
            yield data[start : start + _PIECE_BYTES]


# --- reading --------------------------------------------------------------------------------------------------------


class StateFile:
    """A state file that is open. Use it as a context manager.

    Opening reads the header and the tokens; `verify` reads everything.

    Args:
        path: of the file.

    Attributes:
        snapshot: the KV cache: read-only views of the file.
        sha256: of the contents, when they were written.

    Raises:
        StateError: the file is missing, damaged, of another format version, or of another program.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_tensor_file(path, StateError)
        model, self.sha256 = _metadata(header)
        _check_tensors(header)
        self._file = MappedFile(path, header.stamp, StateError)
        try:
            self._tensors = {
                name: self._file.array(_DTYPES[entry.dtype], entry.shape, entry.offset)
                for name in _TENSORS
                if (entry := header.entries.get(name)) is not None
            }
            tokens = tuple(self._tensors["token_ids"].tolist())
            self._file.check_unchanged()
            self.snapshot = KvSnapshot(model, tokens, self._tensors["keys"], self._tensors["values"])
        except BaseException:
            self._file.close()
            raise

    def verify(self, progress: Progress | None = None) -> None:
        """Read everything, and compare it with the digest that was taken before it was written.

        Raises:
            StateError: the file is damaged, holds a NaN or an infinity, or was changed by another program.
        """
        if self.digest(progress) != self.sha256:
            raise StateError(f"{self.path} is damaged: its contents have another SHA-256 than its header; {_ADVICE}.")
        for name in ("keys", "values"):
            if not all(np.isfinite(layer).all() for layer in self._tensors[name]):
                raise StateError(f"The {name} in {self.path} hold a NaN or an infinity; {_ADVICE}.")

    def digest(self, progress: Progress | None = None) -> str:
        """SHA-256 of the contents, in hexadecimal digits.

        Raises:
            StateError: another program has changed the file.
        """
        digest = hashlib.sha256()
        for piece in _reported("checking", self._tensors, progress):
            digest.update(piece)
        self._file.check_unchanged()
        return digest.hexdigest()

    def messages(self) -> list[dict[str, Any]]:
        """The conversation; empty if the file holds none.

        Raises:
            StateError: it is no list of messages.
        """
        if "messages" not in self._tensors:
            return []
        try:
            messages = load_json(self._tensors["messages"].tobytes())
        except ValueError as error:
            raise StateError(f"The conversation in {self.path} is not JSON ({error}); {_ADVICE}.") from error
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise StateError(f"The conversation in {self.path} is no list of messages; {_ADVICE}.")
        return messages

    def restore(self, context: Context) -> None:
        """Replace what the KV cache holds by this snapshot, which fits.

        Raises:
            StateError: another program has changed the file meanwhile; the KV cache is empty then.
        """
        put_snapshot(self.snapshot, context)
        try:
            self._file.check_unchanged()
        except StateError:
            context.rewind(0)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def is_state_file(path: Path) -> bool:
    """Whether a file is a safetensors file by its first bytes, and no text; False if it cannot be read.

    It begins with the length of its header, a number of 8 bytes, and with the header's brace.
    """
    try:
        with path.open("rb") as file:
            first = file.read(9)
    except OSError:
        return False
    return first[7:] == b"\0{"


def _metadata(file: TensorFile) -> tuple[ModelIdentity, str]:
    """The model, and the digest of the tensors."""
    path, metadata = file.path, file.metadata
    if metadata.get("format") != FORMAT:
        raise StateError(f"{path} is not a KV cache saved by this program; check the path.")
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise StateError(
            f"{path} has format version {quote(version)}, this program reads version {FORMAT_VERSION}; {_ADVICE}."
        )
    try:
        model = load_json(metadata.get("model", ""))
    except ValueError as error:
        raise StateError(f"The model record of {path} is not JSON ({error}); {_ADVICE}.") from error
    match model:
        case {"name": str(name), "fingerprint": str(fingerprint)}:
            return ModelIdentity(name, fingerprint), metadata.get("sha256", "")
    raise StateError(f"The model record of {path} has no name and fingerprint; {_ADVICE}.")


def _check_tensors(file: TensorFile) -> None:
    """Check names, dtypes, dimensions, limits and alignment; `check_fits` compares the sizes with a model."""
    for name in file.entries:
        if name not in _TENSORS:
            raise StateError(f"{file.path} holds an unknown tensor {short(name)}; {_ADVICE}.")
    for name, (dtypes, dimensions) in _TENSORS.items():
        entry = file.entries.get(name)
        if entry is None:
            if name == "messages":
                continue
            raise StateError(f"{file.path} lacks the tensor {name}; {_ADVICE}.")
        if entry.dtype not in dtypes or len(entry.shape) != dimensions:
            raise StateError(
                f"Tensor {name} of {file.path} is {entry.dtype} {quote(list(entry.shape))}, not "
                f"{' or '.join(dtypes)} of {dimensions} dimensions; {_ADVICE}."
            )
        if dimensions == 1 and entry.nbytes > MOST_BYTES:  # these become Python objects, much larger ones
            raise StateError(f"Tensor {name} of {file.path} has {entry.nbytes} bytes, too many; {_ADVICE}.")
        if entry.offset % _DTYPES[entry.dtype].itemsize:
            raise StateError(f"Tensor {name} of {file.path} is misaligned; {_ADVICE}.")
