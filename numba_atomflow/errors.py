"""What can go wrong for a user. Each message is one sentence: what is at fault, and what to do about it.

The command line prints the sentence and leaves with exit code 2; nothing here ever reaches a user as a traceback.
"""


class AtomFlowError(Exception):
    """Base of every error that a user's input or machine can cause."""


class GeometryError(AtomFlowError):
    """A model description is incomplete, contradictory, or of a family that is not supported."""


class SourceError(AtomFlowError):
    """The weights to convert are missing, damaged, or do not fit their own description."""


class SourceWarning(UserWarning):
    """A model to convert says something that is not followed; the sentence tells what is done instead."""


class HubError(AtomFlowError):
    """A model cannot be fetched from the Hugging Face hub: no network, no such model, no access, damage on the way."""


class CheckpointError(AtomFlowError):
    """An FP8 checkpoint is missing, damaged, or of another format version."""


class DestinationError(AtomFlowError):
    """A file could not be written: read-only folder, full disk, or it exists already."""


class OptionError(AtomFlowError):
    """An option has a value outside its range."""


class ContextError(AtomFlowError):
    """A prompt does not fit into the context."""


class BackendError(AtomFlowError):
    """The backend that was asked for cannot run on this machine."""


class ClosedError(AtomFlowError):
    """An engine, a backend or a checkpoint was used after it had been closed."""


class EngineBusyError(AtomFlowError):
    """An engine was used while another thread uses it, or in the middle of one of its own steps."""


class OutOfBlocksError(AtomFlowError):
    """The paged KV cache has too few free blocks for what a sequence needs next."""


class TextError(AtomFlowError):
    """A tokenizer, a chat template or a chat message is missing, damaged, or of a kind that is not supported."""


class GroundTruthError(AtomFlowError):
    """A ground truth is missing, damaged, of another format version, or of another model or prompt."""


def non_finite_logits() -> CheckpointError:
    """The error to raise when the largest logit is NaN or Inf."""
    return CheckpointError(
        "Logits contain NaN or Inf: the checkpoint is damaged; check it with `numba-atomflow info MODEL --verify`, "
        "or convert it again."
    )
