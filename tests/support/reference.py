"""The model of a checkpoint in transformers: float32 weights, dequantized from FP8."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from closeness import relative_l2
from numpy.typing import NDArray

from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.validate.state_dict import compute_constants, state_dict

transformers = pytest.importorskip("transformers", reason="transformers is the reference: pip install '.[validate]'")
torch = pytest.importorskip("torch", reason="torch is the reference: pip install '.[validate]'")

LIMIT = 1e-4  # relative L2 of logits


def check_logits(got: np.ndarray, expected: np.ndarray, what: str) -> None:
    """At every position: relative L2 error within the limit, and the same arg-max token."""
    errors = [relative_l2(a, b) for a, b in zip(got, expected, strict=True)]
    worst = int(np.argmax(errors))
    share = f"relative L2 {errors[worst]:.3g} is {errors[worst] / LIMIT:.1%} of {LIMIT} at position {worst}"
    assert np.isfinite(errors).all(), what
    assert errors[worst] <= LIMIT, f"{what}: {share}"
    different = np.flatnonzero(got.argmax(axis=1) != expected.argmax(axis=1))
    assert not different.size, f"{what}: another token is most likely at positions {different.tolist()} ({share})"


class Reference:
    """transformers' model of a source, with a checkpoint's weights.

    Args:
        source: the model folder or GGUF file that was converted; transformers reads its configuration.
        checkpoint: the result of the conversion.
    """

    def __init__(self, source: Path, checkpoint: Checkpoint) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transformers, about its dependencies
            location = (str(source),) if source.is_dir() else (str(source.parent),)
            options = {} if source.is_dir() else {"gguf_file": source.name}
            self.config: Any = transformers.AutoConfig.from_pretrained(*location, **options)
            with torch.device("meta"):
                self.model: Any = transformers.AutoModelForCausalLM.from_config(
                    self.config, dtype=torch.float32, attn_implementation="eager"
                )
            compute_constants(self.model, self.config)
            weights = {name: torch.from_numpy(values) for name, values in state_dict(checkpoint).items()}
            self.model.load_state_dict(weights, strict=True, assign=True)
        self.model.eval()

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(token_ids), V] of every position."""
        with torch.no_grad():
            logits: NDArray[np.float32] = self.model(torch.tensor([list(token_ids)])).logits[0].numpy()
        return logits

    def greedy(self, token_ids: Sequence[int], count: int) -> list[int]:
        """`count` tokens of greedy decoding, without stopping at EOS."""
        past, new, out = None, list(token_ids), []
        with torch.no_grad():
            for _ in range(count):
                step = self.model(torch.tensor([new]), past_key_values=past, use_cache=True)
                past, new = step.past_key_values, [int(step.logits[0, -1].argmax())]
                out += new
        return out
