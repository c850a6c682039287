"""A file's bytes as read-only arrays, with detection of changes since it was opened."""

import hashlib
import math
import mmap
import os
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.errors import AtomFlowError, ClosedError
from numba_atomflow.files.stamp import FileStamp, changed_sentence
from numba_atomflow.memory.fault_handler import Watch

_COPY_CHUNK_BYTES = 1 << 26  # bytes
_HASH_CHUNK_BYTES = 1 << 20


class MappedFile:
    """A regular file, opened once; maps, reads and checks use the same descriptor.

    It is mapped with the first array. If another program replaces or deletes the file, nothing changes. If it writes to
    the file or truncates it, arrays have other contents (zeros after the end of the file), and `check_unchanged`
    raises.

    Args:
        path: of the file.
        stamp: required stamp, from an earlier read of the file.
        error: class of the exceptions.
        private_copy: arrays are views of a copy in memory, which other programs cannot change.

    Raises:
        AtomFlowError: of class `error`: the file cannot be opened, or has another stamp.
    """

    def __init__(self, path: Path, stamp: FileStamp, error: type[AtomFlowError], *, private_copy: bool = False) -> None:
        self.path, self._error, self._private_copy = path, error, private_copy
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as problem:
            raise self._read_error(problem) from problem
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._map: mmap.mmap | None = None
        self._watch: Watch | None = None
        status = os.fstat(self._descriptor)
        self._stamp, self._changed_at = stamp, status.st_ctime_ns
        self._attributes = _attributes(status)
        if FileStamp.of(status) != stamp:
            self._close()
            raise self._change_error()

    def read(self, offset: int, count: int) -> bytes:
        """Read `count` bytes at `offset`, without mapping the file.

        Raises:
            AtomFlowError: the file cannot be read, or has changed.
        """
        self._check_open()
        try:
            data = os.pread(self._descriptor, count, offset)
            while len(data) < count and (piece := os.pread(self._descriptor, count - len(data), offset + len(data))):
                data += piece
        except OSError as problem:
            raise self._read_error(problem) from problem
        self.check_unchanged()
        if len(data) < count:
            raise self._change_error()
        return data

    def sha256(self) -> str:
        """SHA-256 of the file, in hexadecimal digits.

        Raises:
            AtomFlowError: the file cannot be read, or has changed.
        """
        digest = hashlib.sha256()
        for start in range(0, self._stamp.size, _HASH_CHUNK_BYTES):
            digest.update(self.read(start, min(_HASH_CHUNK_BYTES, self._stamp.size - start)))
        return digest.hexdigest()

    def array(self, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> NDArray[Any]:
        """A read-only view of the bytes at `offset`. It stays valid after `close`.

        Raises:
            AtomFlowError: the file cannot be mapped, or has changed before it was copied.
        """
        self._check_open()
        if self._map is None:
            self._map = self._copy_file() if self._private_copy else self._map_file()
        view = np.frombuffer(self._map, dtype, math.prod(shape), offset).reshape(shape)  # keeps the mapping alive
        view.flags.writeable = False
        return view

    def release(self, offset: int, count: int) -> None:
        """Give back the memory of whole pages within these bytes; using them again reads them from the file again.

        A private copy, and systems that cannot, keep it.
        """
        advice = getattr(mmap, "MADV_DONTNEED", None)
        if self._map is None or self._private_copy or advice is None:
            return
        start, stop = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE, (offset + count) // mmap.PAGESIZE * mmap.PAGESIZE
        if start < stop:
            with suppress(OSError):  # pages that are locked in memory stay there
                self._map.madvise(advice, start, stop - start)

    def check_unchanged(self) -> None:
        """Check that the file was not written to or truncated since it was opened. Costs one system call.

        Raises:
            AtomFlowError: another program has changed the file.
        """
        if not self._close.alive or (self._private_copy and self._map is not None):
            return
        status = os.fstat(self._descriptor)
        if self._watch is not None and self._watch.faulted:
            raise self._change_error()
        if status.st_ctime_ns == self._changed_at and status.st_size == self._stamp.size:
            return
        if FileStamp.of(status) != self._stamp or self._is_backdated(status):
            raise self._change_error()
        self._changed_at, self._attributes = status.st_ctime_ns, _attributes(status)

    def close(self) -> None:
        """Unmap the file; while arrays of it exist, the mapping lives until the last of them is gone."""
        self._close()
        if self._map is not None:
            with suppress(BufferError):
                self._map.close()
                if self._watch is not None:
                    self._watch.end()
            self._map = None

    def _is_backdated(self, status: os.stat_result) -> bool:
        """Whether the file may have been written to and its mtime restored, as by ``cp -p`` and ``rsync -t``.

        Rename, chown, chmod and unlink change ctime as well, but also other attributes.
        """
        try:
            path_status = self.path.stat()
        except OSError:
            return False
        return _attributes(status) == self._attributes and os.path.samestat(path_status, status)

    def _map_file(self) -> mmap.mmap:
        try:
            mapped = mmap.mmap(self._descriptor, self._stamp.size, access=mmap.ACCESS_READ)
        except ValueError as problem:  # the file was truncated
            raise self._change_error() from problem
        except OSError as problem:
            raise self._error(f"{self.path} cannot be mapped ({problem.strerror}).") from problem
        self._watch = Watch(mapped, np.frombuffer(mapped, np.uint8).ctypes.data)
        return mapped

    def _copy_file(self) -> mmap.mmap:
        try:
            copy = mmap.mmap(-1, self._stamp.size)
        except OSError as problem:
            raise self._error(
                f"{self.path} cannot be copied: this machine refused {self._stamp.size / 1e9:.1f} GB; "
                "use it without a private copy."
            ) from problem
        copied_bytes = 0
        with memoryview(copy) as target:
            while copied_bytes < self._stamp.size:
                try:
                    count = os.preadv(
                        self._descriptor, [target[copied_bytes : copied_bytes + _COPY_CHUNK_BYTES]], copied_bytes
                    )
                except OSError as problem:
                    raise self._read_error(problem) from problem
                if not count:
                    raise self._change_error()
                copied_bytes += count
        self.check_unchanged()
        return copy

    def _check_open(self) -> None:
        if not self._close.alive:
            raise ClosedError(f"{self.path} was closed before; open it again.")

    def _change_error(self) -> AtomFlowError:
        return self._error(changed_sentence(self.path))

    def _read_error(self, problem: OSError) -> AtomFlowError:
        return self._error(f"{self.path} cannot be read ({problem.strerror}); check the path and its permissions.")


def _attributes(status: os.stat_result) -> tuple[int, int, int, int]:
    """Attributes that change without a change of the contents."""
    return status.st_nlink, status.st_mode, status.st_uid, status.st_gid
