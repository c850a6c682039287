"""Computations on captured activations that research asks for again and again; docs/research.md has examples.

    from numba_atomflow import Engine, research

    engine = Engine.load("smollm2-135m-instruct")
    lens = research.logit_lens(engine, "The capital of France is")

Each is built on `Engine.capture` and `Engine.unembed`, and leaves the prompt in the KV cache, as they do.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.engine import Engine
from numba_atomflow.errors import OptionError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.utils.arguments import whole_number


def logit_lens(engine: Engine, prompt: str | Sequence[int], position: int = -1) -> NDArray[np.float32]:
    """What the LM head makes of the residual stream after each layer, at one position of a prompt.

    Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).

    Args:
        engine: of the model.
        prompt: a text or token ids.
        position: of the token; negative numbers count from the end.

    Returns:
        float32 [layers + 1, V]: row i is the stream's after i layers. The last row has the model's own logits.

    Raises:
        OptionError: the prompt has no such position; or see `Engine.capture`.
    """
    position = whole_number("position", position)
    stream = engine.capture(prompt, ["embedding", "layer.*.output"])
    tokens = engine.position
    if not -tokens <= position < tokens:
        raise OptionError(f"position is {position}, but the prompt has {tokens} tokens.")
    return engine.unembed(np.stack([rows[position] for rows in stream.values()]))


def attention_weights(
    engine: Engine, prompt: str | Sequence[int], layer: int, heads: Sequence[int] | None = None
) -> NDArray[np.float32]:
    """Which tokens the heads of a layer attend to.

    The exact softmax, in float64, of the queries and the keys that the model computed with. Kernels do not keep it.

    Args:
        engine: of the model.
        prompt: a text or token ids.
        layer: its index.
        heads: query heads; all of them if None.

    Returns:
        float32 [heads, tokens, tokens]: the weights of row i sum to 1 over the tokens up to i, and are 0 after it.

    Raises:
        OptionError: there is no such layer or head; or see `Engine.capture`.
    """
    g = engine.geometry
    layer = _index("layer", layer, g.layers)
    chosen = range(g.heads) if heads is None else [_index("a head", head, g.heads) for head in heads]
    captured = engine.capture(prompt, [f"layer.{layer}.q", f"layer.{layer}.k"])
    queries = captured[f"layer.{layer}.q"].reshape(-1, g.heads, g.head_dim).astype(np.float64)
    keys = captured[f"layer.{layer}.k"].reshape(-1, g.kv_heads, g.head_dim).astype(np.float64)
    tokens = len(queries)
    visible = np.tri(tokens, dtype=np.bool_)
    weights = np.empty((len(chosen), tokens, tokens), np.float32)
    for row, head in enumerate(chosen):
        scores = queries[:, head] @ keys[:, head // g.gqa_ratio].T / np.sqrt(g.head_dim)
        scores = np.where(visible, scores, -np.inf)
        exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights[row] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return weights


def _index(name: str, value: object, count: int) -> int:
    index = whole_number(name, value)
    if not 0 <= index < count:
        raise OptionError(f"{name} is {quote(value)}; this model has 0 to {count - 1}.")
    return index
