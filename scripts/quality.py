"""What FP8 costs in quality: this engine against transformers' own load of the unquantised GGUF, on the same texts.

Both read the same tokens. At every position of every text the two distributions of the next token are compared: is the
most likely token the same (top-1), and how much information is lost (Kullback-Leibler divergence from the unquantised
model to this engine, in nats per token)?

    python scripts/quality.py                          # the demo model
    python scripts/quality.py model.safetensors --gguf model.gguf --json

Needs the extra `validate` (torch, transformers).
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow import AtomFlowError, Engine
from numba_atomflow.demo import find_gguf
from numba_atomflow.engine import DEFAULT_MODEL

TEXTS = {
    "facts": (
        "A glacier forms where more snow falls in winter than melts in summer. Over decades the lower layers are "
        "pressed into ice, and once it is about thirty metres thick it begins to flow downhill under its own "
        "weight. The middle moves faster than the edges, and the surface faster than the bed, so that deep cracks, "
        "called crevasses, open in the brittle upper part. Where the tongue reaches warmer air it melts, leaving "
        "behind a ridge of rubble that marks how far the ice once came. Geologists read such moraines as a record "
        "of past climates, and measure the age of a boulder by the isotopes that cosmic rays have made in its "
        "surface since it was uncovered."
    ),
    "story": (
        "Marta had promised her brother that she would not open the letter before the train crossed the border. "
        "She put it between the pages of her book and looked out of the window, where the fields were giving way "
        "to woods. An old man sat down opposite her, took a boiled egg out of a paper bag, and asked whether she "
        "minded. She said that she did not. 'You are going home,' he said, and it was not a question. 'How can you "
        "tell?' 'People who leave look at the landscape. People who return look at the clock.' She laughed, and "
        "found that she had, in fact, been counting the minutes. When the train stopped at the last station, she "
        "reached for the book."
    ),
    "code": (
        'class RingBuffer:\n    """A queue of fixed size: when it is full, the oldest item is '
        'overwritten."""\n\n    def __init__(self, size):\n        if size < 1:\n            raise '
        "ValueError('size must be at least 1')\n        self._items = [None] * size\n        self._start = "
        "0\n        self._count = 0\n\n    def push(self, item):\n        end = (self._start + self._count) % "
        "len(self._items)\n        self._items[end] = item\n        if self._count == "
        "len(self._items):\n            self._start = (self._start + 1) % len(self._items)\n        "
        "else:\n            self._count += 1\n\n    def pop(self):\n        if self._count == 0:\n            "
        "raise IndexError('the buffer is empty')\n        item = self._items[self._start]\n        self._start = "
        "(self._start + 1) % len(self._items)\n        self._count -= 1\n        return item\n"
    ),
    "chat": (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nMy bread does not rise any more. I use the same flour and the same oven as last year. "
        "What could be wrong?<|im_end|>\n<|im_start|>assistant\nThe most likely cause is the yeast. Dry yeast "
        "loses its strength after a few months, above all when the packet has been open. Stir a teaspoon of it "
        "into half a cup of warm water with a pinch of sugar: if there is no foam after ten minutes, buy fresh "
        "yeast. If it foams, check the temperature of the dough. In a cold kitchen it may need twice as long, and "
        "water that is too hot kills the yeast. Finally, weigh the salt, because too much of it slows the dough "
        "down.<|im_end|>\n"
    ),
    "list": (
        "Packing list for a week in the mountains:\n1. Two pairs of walking trousers and one of shorts\n2. Five "
        "pairs of woollen socks\n3. A rain jacket with a hood\n4. A map on a scale of 1:25,000 and a compass\n5. A "
        "first-aid kit with plasters, bandages and tape\n6. A head torch and spare batteries\n7. Sun cream, "
        "sunglasses and a hat\n8. A water bottle that holds at least 1.5 litres\n\nDistances: day 1, 12 km and 800 "
        "m of ascent; day 2, 9 km and 1,150 m of ascent; day 3, rest; day 4, 17 km and 600 m of ascent."
    ),
}


def measure(model: str, gguf: Path) -> dict[str, Any]:
    """Both models over all texts."""
    reference = load_reference(gguf)
    with Engine.load(model) as engine:
        texts = {name: compare_text(engine, reference, text) for name, text in TEXTS.items()}
        described = {
            "model": model,
            "gguf": gguf.name,
            "quantiser": json.loads(engine.checkpoint.metadata["quantiser"]),
        }
    divergences = np.concatenate([text.pop("divergences") for text in texts.values()])
    agreed = sum(text["agreed"] for text in texts.values())
    total = {"positions": len(divergences), "agreed": agreed, "mean_kl": float(divergences.mean())}
    return described | {"texts": texts, "total": total, "kl_99_percent": float(np.quantile(divergences, 0.99))}


def load_reference(gguf: Path) -> Any:
    """The unquantised model: transformers dequantises the GGUF to float32."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    ).eval()


def compare_text(engine: Engine, reference: Any, text: str) -> dict[str, Any]:
    """Next-token distributions at every position of one text."""
    import torch

    tokens = engine.text.encode(text)
    with torch.no_grad():
        theirs = reference(torch.tensor([tokens])).logits[0].numpy()
    engine.reset()
    ours = engine.feed(tokens, all_logits=True)
    p, q = log_softmax(theirs), log_softmax(ours)
    divergences = (np.exp(p) * (p - q)).sum(axis=1)
    return {
        "positions": len(tokens),
        "agreed": int((theirs.argmax(axis=1) == ours.argmax(axis=1)).sum()),
        "mean_kl": float(divergences.mean()),
        "divergences": divergences,
    }


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logarithms of the probabilities [T, V]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_probabilities: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return log_probabilities


def report(r: dict[str, Any]) -> str:
    """The record as a table to read."""

    def row(name: str, part: dict[str, Any]) -> str:
        return f"{name:8} {part['positions']:9} {part['agreed'] / part['positions']:9.1%} {part['mean_kl']:10.4f}"

    return "\n".join(
        [
            f"{r['model']} ({r['quantiser']['method']}, groups of {r['quantiser']['group_size']}) against {r['gguf']}",
            "text     positions     top-1    mean KL",
            *(row(name, part) for name, part in r["texts"].items()),
            row("all", r["total"]),
            f"99 % of all positions have a KL below {r['kl_99_percent']:.3f}",
        ]
    )


def main() -> int:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="checkpoint, or the name of one")
    parser.add_argument("--gguf", type=Path, help="what it was converted from (default: the demo model's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: {' and '.join(missing)} missing; run pip install '.[validate]'.", file=sys.stderr)
        return 2
    try:
        result = measure(options.model, options.gguf or find_gguf())
    except AtomFlowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result) if options.json else report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
