"""Pre-tokenizers of byte-level BPE: how text is split into pieces before merges.

Regular expressions and normalizers are those in ``tokenizer.json`` of the models, in their order.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PreTokenizer:
    """A pre-tokenizer, which splits text into pieces before BPE merges.

    Attributes:
        family: of models that use it, for messages.
        splits: regular expressions of pieces: each splits what those before it have left; empty: the one of GPT-2,
            built into the tokenizers library.
        digits_first: digits are split off individually before that.
        whole_words: a piece that is in the vocabulary is one token, without merges.
        adds_bos: default for a BOS at the start of a text, if the file does not specify it.
        nfc: text is normalized to Unicode NFC first.
    """

    family: str
    splits: tuple[str, ...] = ()
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
        steps += [
            {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
            for split in self.splits
        ]
        steps.append(byte_level | {"use_regex": not self.splits})
        return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


# The tail that most expressions share: punctuation with the line breaks after it, line breaks, white space.
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CL100K = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_OTHER = r"[^\r\n\p{L}\p{N}]?"  # one character before a word
_CASED = (rf"{_OTHER}[{_UPPER}]*[{_LOWER}]+", rf"{_OTHER}[{_UPPER}]+[{_LOWER}]*")  # words up to a change of case
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
# Letters with case, as listed in the model's tokenizer.json. The escaped ones have another form in NFC.
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ"
    "\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-"
    "Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_CHINESE_KOREAN = "[一-龥ࠀ-一가-퟿]+"

GPT2 = PreTokenizer("GPT-2")
OLMO = PreTokenizer("OLMo", nfc=True)
SMOLLM = PreTokenizer("SmolLM", digits_first=True)
LLAMA3 = PreTokenizer("Llama 3", (_CL100K,), whole_words=True, adds_bos=True)
SMOLLM3 = PreTokenizer("SmolLM3", (_CL100K,), whole_words=True)
GPT4 = PreTokenizer("GPT-4", (_CL100K,))
GPT4O = PreTokenizer(
    "GPT-4o",
    (rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}",),
)
TEKKEN = PreTokenizer(
    "Mistral Nemo", (rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SYMBOLS}|{_SPACES}",), whole_words=True, adds_bos=True
)
QWEN2 = PreTokenizer("Qwen2", (_CL100K.replace("{1,3}", ""),), nfc=True)
DEEPSEEK_LLM = PreTokenizer(
    "DeepSeek LLM",
    (
        "[\r\n]",
        rf"\s?[{_CASED_LETTERS}]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        _CHINESE_KOREAN,
        r"\p{N}+",
    ),
)
DEEPSEEK_CODER = PreTokenizer("DeepSeek Coder", ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE_KOREAN, r"\p{N}"))
DEEPSEEK_V3 = PreTokenizer(
    "DeepSeek V3",
    (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        (
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
            rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
        ),
    ),
)
