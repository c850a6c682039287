"""Errors that a user can cause. Each message is one sentence: the cause, and what to do about it.

The command line prints the sentence and exits with code 2; none of these reaches a user as a traceback.
"""


class AtomFlowError(Exception):
    """Base class of all errors that are caused by a user's input or machine."""


class GeometryError(AtomFlowError):
    """A model description is incomplete, contradictory, or of a family that is not supported."""


class SourceError(AtomFlowError):
    """The weights to convert are missing, damaged, or do not fit their own description."""


class SourceWarning(UserWarning):
    """A setting of the source model is ignored; the message says what is done instead."""


class HubError(AtomFlowError):
    """A model cannot be downloaded from the Hugging Face hub: no network, unknown model, no access, corruption."""


class CheckpointError(AtomFlowError):
    """An FP8 checkpoint is missing, damaged, or of another format version."""


class DestinationError(AtomFlowError):
    """A file could not be written: read-only folder, full disk, or the file exists."""


class OptionError(AtomFlowError):
    """An option has a value outside its range."""


class ContextError(AtomFlowError):
    """A prompt does not fit into the context."""


class BackendError(AtomFlowError):
    """The requested backend cannot run on this machine."""


class ClosedError(AtomFlowError):
    """An engine, a backend or a checkpoint was used after it was closed."""


class EngineBusyError(AtomFlowError):
    """An engine was called from a second thread, or re-entered during one of its own steps."""


class OutOfBlocksError(AtomFlowError):
    """The paged KV cache has too few free blocks for the next step of a sequence."""


class TextError(AtomFlowError):
    """A tokenizer, a chat template or a chat message is missing, damaged, or of a kind that is not supported."""


class StateError(AtomFlowError):
    """A saved KV cache is missing, damaged, of another format version, or of another model."""


class GroundTruthError(AtomFlowError):
    """A ground truth is missing, damaged, of another format version, or of another model or prompt."""


def non_finite_logits() -> CheckpointError:
    """The error to raise when the largest logit is NaN or Inf."""
    return CheckpointError(
        "Logits contain NaN or Inf: the checkpoint is damaged; check it with `numba-atomflow info MODEL --verify`, "
        "or convert it again."
    )
