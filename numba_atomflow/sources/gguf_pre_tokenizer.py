"""Pre-tokenizers of GGUF files, by the name in the file or detected from the vocabulary."""

import json
from collections.abc import Sequence

from tokenizers import Tokenizer

from numba_atomflow.sources.pre_tokenizers import (
    DEEPSEEK_CODER,
    DEEPSEEK_LLM,
    DEEPSEEK_V3,
    GPT2,
    GPT4,
    GPT4O,
    LLAMA3,
    OLMO,
    QWEN2,
    SMOLLM,
    SMOLLM3,
    TEKKEN,
    PreTokenizer,
)
from numba_atomflow.text.detokenizer import byte_alphabet

# A smaller vocabulary is not sufficient for detection without a marker token: most pre-tokenizers fit it.
MIN_VOCABULARY = 300
MAX_SAMPLE = 20000  # tokens that are tested; takes 0.1 s
MAX_MISFITS = 0.0005  # share of the sample; vocabularies have a few tokens that text never produces


# Values of tokenizer.ggml.pre, without "default", which llama.cpp's converter writes for unknown pre-tokenizers. Names
# are those of the first model that had one: "smaug-bpe" is Llama 3's without the BOS, that of SmolLM3 too.
NAMED = {
    "gpt-2": GPT2,
    "phi-2": GPT2,
    "olmo": OLMO,
    "smollm": SMOLLM,
    "starcoder": SMOLLM,
    "refact": SMOLLM,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "smaug-bpe": SMOLLM3,
    "dbrx": GPT4,
    "gpt-4o": GPT4O,
    "tekken": TEKKEN,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "deepseek-llm": DEEPSEEK_LLM,
    "deepseek-coder": DEEPSEEK_CODER,
    "deepseek-v3": DEEPSEEK_V3,
}
_COARSER = {
    SMOLLM: GPT2,
    QWEN2: LLAMA3,
}  # splits at fewer positions: tokens that fit the finer one fit it too


def detect_pre_tokenizer(tokens: Sequence[str], architecture: object) -> tuple[PreTokenizer | None, bool]:
    """Detect the pre-tokenizer of a byte-level vocabulary, for a file that does not name it.

    A vocabulary has no token that its own pre-tokenizer would split: GPT-2's has "2000", Llama 3's "200" but no number
    of four digits, Qwen2's single digits; GPT-2's has no line break after a semicolon. The result is certain with a
    marker token, or if the vocabulary is large enough and fits only one pre-tokenizer.

    Args:
        tokens: in GPT-2's alphabet, without control tokens other than those that `_from_marker` uses.
        architecture: general.architecture.

    Returns:
        The pre-tokenizer, or None if it is uncertain; and whether any supported pre-tokenizer fits.
    """
    texts = _texts(tokens)
    candidates = (SMOLLM, QWEN2, GPT2, LLAMA3)
    fitting = [candidate for candidate in candidates if _misfits(candidate, texts) <= MAX_MISFITS * len(texts)]
    marked = _from_marker(tokens, architecture)
    if marked in fitting:
        return marked, True
    if len(texts) < MIN_VOCABULARY or marked is not None:
        return None, bool(fitting)
    coarser = {_COARSER.get(candidate) for candidate in fitting}
    finest = [candidate for candidate in fitting if candidate not in coarser]
    return (finest[0] if len(finest) == 1 else None), bool(fitting)


def _from_marker(tokens: Sequence[str], architecture: object) -> PreTokenizer | None:
    """The pre-tokenizer that a marker token or the architecture implies, or None."""
    ids = {token: i for i, token in enumerate(tokens)}
    if "<|begin_of_text|>" in ids:
        return LLAMA3
    if "<|im_start|>" in ids and "<jupyter_start>" in ids:
        return SMOLLM
    if architecture in ("qwen2", "qwen3") or ids.get("<|endoftext|>") == 151643:
        return QWEN2
    return GPT2 if ids.get("<|endoftext|>") == 50256 else None


def _texts(tokens: Sequence[str]) -> list[str]:
    """The texts of ASCII tokens; of a large vocabulary an evenly spaced sample.

    Other tokens are no evidence: Qwen's own expression splits hundreds of its Thai tokens at combining marks.
    """
    values = byte_alphabet()
    texts = []
    for token in tokens[:: max(1, len(tokens) // MAX_SAMPLE)]:
        if token.startswith(("<", "[")) and token.endswith((">", "]")):
            continue  # an added token, even if its type differs
        try:
            texts.append(bytes([values[character] for character in token]).decode("ascii"))
        except (KeyError, UnicodeDecodeError):
            continue
    return texts


def _misfits(candidate: PreTokenizer, texts: Sequence[str]) -> int:
    """The number of texts that the pre-tokenizer splits."""
    model = {"type": "BPE", "vocab": {}, "merges": []}
    tokenizer = Tokenizer.from_buffer(json.dumps({"model": model, "pre_tokenizer": candidate.steps()}).encode())
    return sum(len(tokenizer.pre_tokenizer.pre_tokenize_str(text)) > 1 for text in texts)
