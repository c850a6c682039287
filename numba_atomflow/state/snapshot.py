"""Snapshots: copies of the KV cache in host memory, which the same model may continue from later.

A snapshot has the format of its backend's KV cache: float32 from the CPU, float16 from a GPU. It is not converted:
rounded keys and values would give other tokens than the engine that computed them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.base import Backend
from numba_atomflow.checkpoint.fingerprint import ModelIdentity
from numba_atomflow.context import Context
from numba_atomflow.errors import ContextError, StateError
from numba_atomflow.files.untrusted import quote, short
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.memory.view import View
from numba_atomflow.model.step import NO_LOGITS, Attention


@dataclass(frozen=True, eq=False)
class KvSnapshot:
    """Keys and values of the first tokens of a KV cache. The arrays may be changed, to restore other values.

    Attributes:
        model: that computed them.
        token_ids: in order.
        keys: [layers, tokens, kv_heads, head_dim], rotated by RoPE; in the backend's format, float32 or float16.
        values: likewise, not rotated.
    """

    model: ModelIdentity
    token_ids: tuple[int, ...]
    keys: NDArray[Any]
    values: NDArray[Any]

    @property
    def position(self) -> int:
        """Number of tokens."""
        return len(self.token_ids)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def prefix(self, position: int) -> "KvSnapshot":
        """The first `position` tokens; shares the memory of this snapshot.

        Raises:
            ContextError: there are fewer.
        """
        if not 0 <= position <= self.position:
            raise ContextError(f"The snapshot holds {self.position} tokens; it has no prefix of {quote(position)}.")
        return replace(
            self,
            token_ids=self.token_ids[:position],
            keys=self.keys[:, :position],
            values=self.values[:, :position],
        )


def take_snapshot(context: Context, geometry: ModelGeometry, model: ModelIdentity) -> KvSnapshot:
    """Copy what the KV cache holds; waits for the steps that compute it."""
    layers = list(_layers(context.backend))
    position, dtype = len(context.token_ids), layers[0][0].dtype
    shape = (geometry.layers, position, geometry.kv_heads, geometry.head_dim)
    keys, values = np.empty(shape, dtype), np.empty(shape, dtype)
    if position:
        with context.backend.memory() as memory:
            for layer, (key_rows, value_rows) in enumerate(layers):
                keys[layer] = memory.read(key_rows.rows(0, position)).reshape(shape[1:])
                values[layer] = memory.read(value_rows.rows(0, position)).reshape(shape[1:])
    return KvSnapshot(model, tuple(context.token_ids), keys, values)


def bytes_per_token(backend: Backend) -> int:
    """Bytes of keys and values of one token in a snapshot."""
    return sum(np.dtype(view.dtype).itemsize * view.shape[1] for layer in _layers(backend) for view in layer)


def check_fits(
    snapshot: KvSnapshot, context: Context, geometry: ModelGeometry, model: ModelIdentity, name: str = "The snapshot"
) -> None:
    """Check that a snapshot can be restored here.

    Args:
        name: of the snapshot, for messages.

    Raises:
        StateError: it is of another model or KV format, or its arrays do not fit its tokens.
        ContextError: it has more tokens than the KV cache has positions.
    """
    if snapshot.model.fingerprint != model.fingerprint:
        raise StateError(
            f"{name} is of another model ({short(snapshot.model.name)}) than {model.name}; load that model, or "
            "compute the prompt again."
        )
    backend, dtype = context.backend, next(_layers(context.backend))[0].dtype
    if snapshot.keys.dtype != dtype:
        raise StateError(
            f"{name} has a KV cache in {snapshot.keys.dtype}, but the {backend.name} backend keeps {dtype}; use the "
            "backend that it comes from, or compute the prompt again."
        )
    shape = (geometry.layers, snapshot.position, geometry.kv_heads, geometry.head_dim)
    for part, array in (("keys", snapshot.keys), ("values", snapshot.values)):
        if (array.shape, array.dtype) != (shape, snapshot.keys.dtype):
            raise StateError(
                f"{name} has {part} of {array.dtype} {quote(list(array.shape))}, not {dtype} {list(shape)}; "
                "make it again."
            )
    unknown = [token for token in snapshot.token_ids if not 0 <= token < geometry.vocabulary]
    if unknown:
        raise StateError(f"{name} has the token {quote(unknown[0])}, which the vocabulary lacks; make it again.")
    if snapshot.position > context.max_seq_len:
        raise ContextError(
            f"{name} has {snapshot.position} tokens, but the context holds {context.max_seq_len}; raise "
            f"--max-seq-len (the model allows {geometry.max_positions})."
        )


def put_snapshot(snapshot: KvSnapshot, context: Context) -> None:
    """Replace what the KV cache holds by a snapshot that fits. If it is interrupted, the KV cache is empty."""
    context.rewind(0)
    position = snapshot.position
    if position:
        with context.backend.memory() as memory:
            for layer, (key_rows, value_rows) in enumerate(_layers(context.backend)):
                memory.write(key_rows.rows(0, position), snapshot.keys[layer].reshape(position, -1))
                memory.write(value_rows.rows(0, position), snapshot.values[layer].reshape(position, -1))
    context.adopt(snapshot.token_ids)


def _layers(backend: Backend) -> Iterator[tuple[View, View]]:
    """Keys and values of each layer: two views [positions, kv_dim]."""
    return ((op.keys, op.values) for op in backend.step(1, NO_LOGITS) if isinstance(op, Attention))
