"""Downloads models from the Hugging Face hub, with resumption of interrupted downloads.

The hub's client (package huggingface-hub, extra ``hub``) handles addresses, tokens, redirects and retries. From version
2 on it restarts a file in every process, so this module writes the file: to ``NAME.partial``, which is renamed when its
digest is that of the hub's listing: SHA-256 of a large file, git's SHA-1 of a small one.

Sources: https://huggingface.co/docs/hub/api and https://git-scm.com/book/en/v2/Git-Internals-Git-Objects.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from numba_atomflow import home
from numba_atomflow.errors import HubError
from numba_atomflow.files.untrusted import short
from numba_atomflow.sources.gguf_parts import part_names
from numba_atomflow.sources.huggingface import CONFIG, INDEX, SINGLE, shard_names
from numba_atomflow.sources.huggingface_text import TEXT_FILES
from numba_atomflow.sources.huggingface_tokens import TOKENIZER
from numba_atomflow.sources.huggingface_vocabulary import OTHER_TOKENIZERS, VOCABULARY_FILES
from numba_atomflow.utils.progress import Progress

_NAME = r"[A-Za-z0-9][\w.-]{0,95}"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
_HTTP_CLIENTS = ("requests", "httpx", "httpx2", "httpcore", "httpcore2")
_MODEL = re.compile(rf"({_NAME}/{_NAME})(?:/({_NAME}\.gguf))?")


@dataclass(frozen=True)
class HubModel:
    """A model on the hub.

    Attributes:
        repo: ``organisation/name``.
        file: a GGUF file of the repository, or any part of a split one; None: config.json and safetensors.
        revision: a branch, a tag or a commit.
    """

    repo: str
    file: str | None = None
    revision: str = "main"

    @classmethod
    def parse(cls, text: str, revision: str | None = None) -> "HubModel | None":
        """Parse ``org/name`` or ``org/name/file.gguf``; None if `text` is neither, or looks like a file path."""
        match = _MODEL.fullmatch(text)
        if match is None or match[1].endswith((".gguf", ".safetensors", ".bin")):
            return None
        return cls(match[1], match[2], revision or "main")


@dataclass(frozen=True)
class _RemoteFile:
    """A file in the hub's listing: size in bytes, and SHA-256 or git's SHA-1."""

    name: str
    size: int
    digest: str


def fetch(model: HubModel, progress: Progress | None = None, endpoint: str | None = None) -> Path:
    """Download a model, or its missing files.

    Args:
        model: to download.
        progress: called with the name of a file, bytes done and total bytes.
        endpoint: URL of the hub; None: HF_ENDPOINT, or https://huggingface.co.

    Returns:
        The folder in `home.downloads`, or the GGUF file in it.

    Raises:
        HubError: the hub cannot be reached, has no such model, or denies access; or the client is not installed.
    """
    if find_spec("huggingface_hub") is None:
        raise HubError(
            f"There is no folder or file {model.repo} here; to fetch it from the hub, install its client: "
            "pip install 'numba-atomflow[hub]'."
        )
    with _translate_errors(model):
        commit, files = _listing(model, endpoint)
    folder = home.downloads() / f"{model.repo.replace('/', '--')}@{commit[:12]}"
    download = _Download(model, commit, folder, endpoint, progress or (lambda *_: None))
    with _translate_errors(model), _locked(folder):
        if model.file is not None:
            download.get([_remote_file(model, files, name) for name in part_names(model.file)])
            return folder / model.file
        download.get([file for name, file in files.items() if name in {CONFIG, INDEX, *TEXT_FILES}])
        if CONFIG not in files or not {SINGLE, INDEX} & set(files):
            raise HubError(_no_weights(model, files))
        if TOKENIZER not in files:
            download.get([file for name, file in files.items() if name in VOCABULARY_FILES])
        other = next((name for name in OTHER_TOKENIZERS if name in files), None)
        if other is not None and not files.keys() & {TOKENIZER, *VOCABULARY_FILES}:  # would be found after the weights
            raise HubError(
                f"{model.repo} on the hub holds its tokenizer as {other}, but no {TOKENIZER}; make one with "
                "transformers, in a folder of your own, or choose another model."
            )
        shards = [SINGLE] if SINGLE in files else shard_names(folder / INDEX)
        download.get([_remote_file(model, files, name) for name in shards])
    return folder


def _listing(model: HubModel, endpoint: str | None) -> tuple[str, dict[str, _RemoteFile]]:
    """The commit of the revision, and its files."""
    from huggingface_hub import HfApi

    info: Any = HfApi(endpoint=endpoint).model_info(model.repo, revision=model.revision, files_metadata=True)
    files = {}
    for entry in info.siblings or ():
        digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
        files[entry.rfilename] = _RemoteFile(entry.rfilename, entry.size or 0, digest or "")
    return str(info.sha), files


def _remote_file(model: HubModel, files: dict[str, _RemoteFile], name: str) -> _RemoteFile:
    if name not in files:
        raise HubError(f"{model.repo} on the hub has no file {short(name)}; look at its list of files there.")
    return files[name]


def _no_weights(model: HubModel, files: dict[str, _RemoteFile]) -> str:
    gguf = sorted(name for name in files if name.endswith(".gguf") and "/" not in name)
    if gguf:
        return f"{model.repo} on the hub holds GGUF files; name one of them: {model.repo}/{gguf[0]}."
    return f"{model.repo} on the hub holds no {CONFIG} with safetensors weights; choose another model."


@dataclass(frozen=True)
class _Download:
    """The download of one model into its folder."""

    model: HubModel
    commit: str
    folder: Path
    endpoint: str | None
    report: Progress

    def get(self, files: list[_RemoteFile]) -> None:
        """Download the files that are missing."""
        total, done = sum(file.size for file in files), 0
        missing = [file for file in files if not (self.folder / file.name).exists()]
        free = shutil.disk_usage(self.folder).free
        received = sum(part.stat().st_size for file in missing if (part := self._partial(file)).exists())
        if free < sum(file.size for file in missing) - received:
            raise HubError(
                f"{self.model.repo} needs {total / 1e6:.0f} MB in {self.folder}, but only {free / 1e6:.0f} MB are "
                "free; make room, or set NUMBA_ATOMFLOW_HOME to another disk."
            )
        to_fetch = {file.name for file in missing}
        for file in files:
            self.report(file.name, done, total)
            if file.name in to_fetch:
                self._get(file, done, total)
            done += file.size

    def _partial(self, file: _RemoteFile) -> Path:
        return self.folder / f"{file.name}.partial"

    def _get(self, file: _RemoteFile, done: int, total: int) -> None:
        """Download one file, resuming a partial one, and rename it if its digest is correct."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        partial = self._partial(file)
        partial.touch()
        with partial.open("r+b") as stream:
            start = stream.seek(0, os.SEEK_END)
            if start > file.size:
                start = stream.seek(0)
                stream.truncate()
            url = hf_hub_url(self.model.repo, file.name, revision=self.commit, endpoint=self.endpoint)
            target: Any = _ProgressFile(stream, lambda at: self.report(file.name, done + at, total))
            with _quiet_client():
                http_get(url, target, resume_size=start, headers=build_hf_headers(), expected_size=file.size)
        if _digest(partial, file) != file.digest:
            partial.unlink()
            raise HubError(
                f"{file.name} of {self.model.repo} was corrupted in transit (its SHA is not that of the hub's listing) "
                "and has been removed; run the command again."
            )
        partial.replace(self.folder / file.name)


class _ProgressFile:
    """A file that reports its write position; has the methods that `http_get` uses."""

    def __init__(self, file: BinaryIO, report: Callable[[int], None]) -> None:
        self._file, self._report = file, report
        self.seek, self.tell, self.truncate = file.seek, file.tell, file.truncate

    def write(self, data: bytes) -> int:
        written = self._file.write(data)
        self._report(self._file.tell())
        return written


def _digest(path: Path, file: _RemoteFile) -> str:
    """SHA-256 or git's SHA-1 of a blob, as in the listing."""
    with path.open("rb") as stream:
        if len(file.digest) == 64:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        blob = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
        blob.update(stream.read())
        return blob.hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder: a second process waits for the first, and then finds the files complete."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Suppress the client's progress bars and messages."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    disabled, verbosity = are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if not disabled:
            enable_progress_bars()


@contextmanager
def _translate_errors(model: HubModel) -> Iterator[None]:
    """Errors of the client and of the disk become `HubError`.

    The client was built on requests, httpx and httpx2, which have different classes for a lost connection.
    """
    from huggingface_hub import errors as hub_errors

    where = f"{model.repo} on the hub"
    missing = f"There is no folder or file {model.repo} here, and"
    try:
        yield
    except hub_errors.GatedRepoError as error:
        raise HubError(
            f"{where} requires that you accept its terms; do so on its page, then run `hf auth login`."
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{missing} no such model on the hub that you may see; check the name, or run `hf auth login` if it is "
            "private."
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise HubError(f"{where} has no revision {model.revision!r}; give a branch, a tag or a commit.") from error
    except hub_errors.HFValidationError as error:
        raise HubError(
            f"{model.repo} is not here, and the hub can have no model of that name; check the path or the name."
        ) from error
    except hub_errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise HubError(f"{where} could not be fetched: the hub answered {status}; try again later.") from error
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise HubError(
                f"{where} could not be kept in {home.downloads()} ({error.strerror}); make room, or set "
                "NUMBA_ATOMFLOW_HOME to another folder."
            ) from error
        raise HubError(f"{missing} the hub {_unreachable(error)}") from error
    except Exception as error:
        if not any(kind.__module__.partition(".")[0] in _HTTP_CLIENTS for kind in type(error).__mro__):
            raise
        raise HubError(f"{missing} the hub {_unreachable(error)}") from error


def _unreachable(error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return (
        f"could not be reached ({reason}); check the name and the network, and run the command again: the download "
        "resumes where it stopped."
    )
