"""Models that say what a test wants them to say."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from tiny_models import random_weights, tiny_geometry, tiny_tokenizer, write_hf_folder, write_json
from tokenizers import AddedToken

from numba_atomflow.convert import convert

EOS = 1
WORDS = ("<think>", "</think>")  # tokens of their own, as in reasoning models


def write_scripted(folder: Path, script: Sequence[str], template: str) -> Path:
    """A checkpoint whose next token depends on the last one alone: its layers add nothing.

    Args:
        script: what it says after each of these tokens, none of them twice: the first is the prompt's last one, the
            others are the reply, which the end of the sequence follows. Bytes, or `WORDS`.
        template: of chats.
    """
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in WORDS])
    tokens = [tokenizer.encode(text).ids for text in script]
    assert all(len(ids) == 1 for ids in tokens)
    geometry = tiny_geometry(vocabulary=tokenizer.get_vocab_size())
    weights = random_weights(geometry)
    for name, values in weights.items():
        if "o_proj" in name or "down_proj" in name:
            values[:] = 0
    weights["model.norm.weight"][:] = 1
    head = np.zeros_like(weights["lm_head.weight"])
    for (token,), (following,) in pairwise([*tokens, [EOS]]):
        head[following] = weights["model.embed_tokens.weight"][token]
    weights["lm_head.weight"] = head
    write_hf_folder(folder, geometry, weights=weights)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", config | {"chat_template": template})
    return convert(folder, folder.parent / f"{folder.name}.safetensors")
