"""Runs a backend on given tokens under observation: the prompt in chunks, then single decode steps."""

from collections.abc import Sequence

from numba_atomflow.backends.base import Backend
from numba_atomflow.model.step import NO_LOGITS, SAMPLE
from numba_atomflow.utils.progress import Progress
from numba_atomflow.validate.probes import Prober


def walk(
    backend: Backend,
    tokens: Sequence[int],
    prompt_tokens: int,
    prober: Prober,
    block: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Run `tokens` from position 0.

    The chunks are those of `prefill`, if steps under an observer take as many tokens. Single tokens run the ops of
    `decode`, and the sampled token is discarded. Logits of the other rows of a chunk are computed by `Backend.logits`.

    Args:
        backend: of the model; its KV cache is overwritten.
        tokens: prompt and decode steps.
        prompt_tokens: how many of them are the prompt.
        prober: observes every op.
        block: tokens per step of the prompt; the backend's own if None, 1 to take it as decode steps.
        progress: called with a description, tokens done and total tokens.
    """
    width = backend.observed_chunk if block is None else min(block, backend.observed_chunk)
    starts = [*range(0, prompt_tokens, width), *range(prompt_tokens, len(tokens))]
    stops = [*starts[1:], len(tokens)]
    backend.seek(0)
    for start, stop in zip(starts, stops, strict=True):
        if progress:
            progress("decode" if start >= prompt_tokens else "prompt", start, len(tokens))
        prober.begin(start)
        ends_prompt = stop >= prompt_tokens
        backend.observe(tokens[start:stop], SAMPLE if ends_prompt or stop - start == 1 else NO_LOGITS, prober)
        if stop - start > 1:
            backend.logits(0, stop - start, prober)
    if progress:
        progress("done", len(tokens), len(tokens))
