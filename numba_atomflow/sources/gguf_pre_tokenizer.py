"""How the vocabularies of GGUF files cut text before they merge: a file holds the name, or nothing.

Expressions and normalisers: the ``tokenizer.json`` of the models that the names come from.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from numba_atomflow.text.detokenizer import byte_alphabet

# Without a telltale token, fewer tokens than these are no evidence: most splittings would leave each of them whole.
LEAST_VOCABULARY = 300
MOST_LOOKED_AT = 20000  # tokens; 0.1 s
MOST_MISFITS = 0.0005  # of them; vocabularies hold a few tokens that text never gives


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut text.

    Attributes:
        family: whose it is, in words.
        split: regular expression of one piece; None: GPT-2's, which tokenizers has built in.
        digits_first: every digit is cut off before that.
        whole_words: a piece that is in the vocabulary is one token, whatever the merges say.
        adds_bos: a text begins with the BOS, if the file does not say.
        nfc: text is normalised to Unicode's form C before all.
    """

    family: str
    split: str | None = None
    digits_first: bool = False
    whole_words: bool = False
    adds_bos: bool = False
    nfc: bool = False

    def steps(self) -> dict[str, Any]:
        """The entry ``pre_tokenizer`` of a tokenizer.json."""
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        steps: list[dict[str, Any]] = []
        if self.digits_first:
            steps.append({"type": "Digits", "individual_digits": True})
        if self.split is not None:
            pattern = {"Regex": self.split}
            steps.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
        steps.append(byte_level | {"use_regex": self.split is None})
        return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


GPT2 = PreTokenizer("GPT-2")
SMOLLM = PreTokenizer("SmolLM", digits_first=True)
LLAMA3 = PreTokenizer(
    "Llama 3",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    whole_words=True,
    adds_bos=True,
)
QWEN2 = PreTokenizer(
    "Qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    nfc=True,
)
# Values of tokenizer.ggml.pre. "default" is not among them: no model has it, llama.cpp's converter writes it where it
# knows nothing.
NAMED = {
    "gpt-2": GPT2,
    "smollm": SMOLLM,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": QWEN2,
}
_COARSER = {SMOLLM: GPT2, QWEN2: LLAMA3}  # cuts less, and never elsewhere: what fits the finer one fits it as well


def recognised(tokens: Sequence[str], architecture: object) -> tuple[PreTokenizer | None, bool]:
    """Whose splitting a byte-level vocabulary was trained with, where the file does not name it.

    A vocabulary holds no token that its own splitting would cut: GPT-2's has "2000", Llama 3's "200" but no number of
    four digits, Qwen2's single digits; GPT-2's has no line break after a semicolon. A telltale token, or a vocabulary
    that is large enough and fits one splitting only, makes sure.

    Args:
        tokens: spellings in GPT-2's alphabet, without control tokens, except those that `_telltale` knows.
        architecture: general.architecture.

    Returns:
        The splitting, or None if it is not sure; and whether any of the supported splittings fits.
    """
    texts = _texts(tokens)
    fitting = [way for way in (SMOLLM, QWEN2, GPT2, LLAMA3) if _misfits(way, texts) <= MOST_MISFITS * len(texts)]
    told = _telltale(tokens, architecture)
    if told in fitting:
        return told, True
    if len(texts) < LEAST_VOCABULARY or told is not None:
        return None, bool(fitting)
    finest = [way for way in fitting if way not in {_COARSER.get(other) for other in fitting}]
    return (finest[0] if len(finest) == 1 else None), bool(fitting)


def _telltale(tokens: Sequence[str], architecture: object) -> PreTokenizer | None:
    ids = {token: i for i, token in enumerate(tokens)}
    if "<|begin_of_text|>" in ids:
        return LLAMA3
    if "<|im_start|>" in ids and "<jupyter_start>" in ids:
        return SMOLLM
    if architecture in ("qwen2", "qwen3") or ids.get("<|endoftext|>") == 151643:
        return QWEN2
    return GPT2 if ids.get("<|endoftext|>") == 50256 else None


def _texts(tokens: Sequence[str]) -> list[str]:
    """What the tokens of plain ASCII stand for, of a large vocabulary an even share.

    Others do not tell: Qwen's vocabulary has hundreds of Thai tokens that its own expression cuts at combining marks.
    """
    values = byte_alphabet()
    texts = []
    for token in tokens[:: max(1, len(tokens) // MOST_LOOKED_AT)]:
        if token.startswith(("<", "[")) and token.endswith((">", "]")):
            continue  # an added token, whatever its type says
        try:
            texts.append(bytes([values[character] for character in token]).decode("ascii"))
        except (KeyError, UnicodeDecodeError):
            continue
    return texts


def _misfits(way: PreTokenizer, texts: Sequence[str]) -> int:
    """How many of the texts are cut."""
    model = {"type": "BPE", "vocab": {}, "merges": []}
    cutter = Tokenizer.from_buffer(json.dumps({"model": model, "pre_tokenizer": way.steps()}).encode())
    return sum(len(cutter.pre_tokenizer.pre_tokenize_str(text)) > 1 for text in texts)
