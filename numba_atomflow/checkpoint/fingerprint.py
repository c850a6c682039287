"""Which model a checkpoint holds: a fingerprint of its geometry and of samples of its weights."""

import hashlib
import json
from typing import NamedTuple

import numpy as np

from numba_atomflow.checkpoint.format import TOKENIZER, Checkpoint
from numba_atomflow.checkpoint.random_weights import RandomModel

_SAMPLES, _SAMPLE_BYTES = 4, 1024  # of each tensor, evenly spaced


class ModelIdentity(NamedTuple):
    """A model, by what its results depend on.

    Attributes:
        name: of its file, for messages.
        fingerprint: SHA-256 in hexadecimal digits; equal for two files that differ in tokenizer or chat template only.
    """

    name: str
    fingerprint: str


def identify(checkpoint: Checkpoint | RandomModel) -> ModelIdentity:
    """The identity of a model: of its geometry, RoPE included, and of 4 KiB of every tensor.

    A conversion of other weights, or by another method, differs in every tensor, and so in the samples; reading all
    of a large checkpoint would take seconds.

    Raises:
        CheckpointError: the file was changed by another program.
        ClosedError: the checkpoint was closed.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.geometry.to_dict(), sort_keys=True).encode())
    if isinstance(checkpoint, RandomModel):
        digest.update(checkpoint.metadata["source"].encode())  # the seed, from which its arrays follow
    else:
        for name in sorted(checkpoint.names()):
            if name != TOKENIZER:
                _add_samples(digest, checkpoint, name)
        checkpoint.check_unchanged()
    return ModelIdentity(checkpoint.path.name, digest.hexdigest())


def _add_samples(digest: "hashlib._Hash", checkpoint: Checkpoint, name: str) -> None:
    tensor = checkpoint.array(name)
    digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
    data = tensor.reshape(-1).view(np.uint8)
    for sample in range(_SAMPLES):
        start = max(0, data.size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1)
        digest.update(data[start : start + _SAMPLE_BYTES].tobytes())
