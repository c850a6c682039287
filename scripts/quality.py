"""Quality loss of FP8: checkpoints of one model against the unquantized source, on two texts.

Both texts come with Python and are not the default calibration text of `numba-atomflow quantize`: Python's license, and
its language reference (the topics of pydoc). transformers computes the source's logits, once for all checkpoints. For
each text: perplexity and its increase over the source's, the mean Kullback-Leibler divergence of the next-token
distribution in nats, and top-1, the share of positions whose most likely token is the same.

    numba-atomflow quantize model.gguf gptq.safetensors
    numba-atomflow convert model.gguf rtn.safetensors
    python scripts/quality.py rtn.safetensors gptq.safetensors --source model.gguf
    python scripts/quality.py --json                           # the demo model

Needs the extra `validate` (torch, transformers).
"""

import argparse
import json
import pydoc_data.topics
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow import AtomFlowError, Engine
from numba_atomflow.checkpoint.find import DEFAULT_MODEL, find_checkpoint
from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.cli.demo import find_gguf
from numba_atomflow.perf.perplexity import Logits, measure
from numba_atomflow.utils.json_text import json_text
from numba_atomflow.validate import original_logits

CHARACTERS = 14000  # of each text
CONTEXT, STRIDE = 512, 384


def read_texts() -> dict[str, str]:
    """The two texts, of about the same length."""
    topics = pydoc_data.topics.topics
    return {
        "license": (Path(sysconfig.get_path("stdlib")) / "LICENSE.txt").read_text()[:CHARACTERS],
        "reference": "\n\n".join(topics[name] for name in sorted(topics))[:CHARACTERS],
    }


def cached(logits: Logits) -> Logits:
    """The same function, which computes each window once."""
    results: dict[tuple[int, ...], NDArray[np.float32]] = {}

    def look_up(tokens: Sequence[int]) -> NDArray[np.float32]:
        key = tuple(tokens)
        if key not in results:
            results[key] = logits(tokens)
        return results[key]

    return look_up


def compare(models: Sequence[str], source: Path) -> list[dict[str, Any]]:
    """One record per checkpoint and text."""
    with Checkpoint.open(find_checkpoint(models[0])) as checkpoint:
        reference = original_logits(checkpoint, source)
    records = []
    for name, text in read_texts().items():
        theirs = cached(reference)
        for model in models:
            with Engine.load(model, max_seq_len=CONTEXT) as engine:
                result = measure(engine, text, CONTEXT, STRIDE, theirs)
                quantiser = json.loads(engine.checkpoint.metadata["quantiser"])
                facts = {"model": str(model), "method": quantiser["method"], "head": engine.checkpoint.head}
            records.append(facts | {"text": name} | result.to_dict())
            print(f"{model} on {name}: {result.perplexity:.4f}", file=sys.stderr)
    return records


def report(records: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown."""
    lines = [
        "| text | method | head | perplexity | increase | mean KL | top-1 |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for record in records:
        other = record["divergence"]
        increase = record["perplexity"] / other["reference_perplexity"] - 1
        lines.append(
            f"| {record['text']} | {record['method']} | {record['head']} | {record['perplexity']:.3f} "
            f"| {increase:+.2%} | {other['mean_kl']:.4f} | {other['top1']:.1%} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[DEFAULT_MODEL], help="checkpoints, or the names of some")
    parser.add_argument("--source", type=Path, help="the source of all checkpoints (default: the demo model's GGUF)")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    options = parser.parse_args()
    try:
        records = compare(options.models, options.source or find_gguf())
    except AtomFlowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json_text(records) if options.json else report(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
