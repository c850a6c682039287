"""Small tokenizers, trained at test time, and their GGUF metadata; without downloads and transformers."""

import json
import math
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from text_samples import SAMPLES
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6

# The expressions of the models' own tokenizer.json, written out.
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


def _byte_level(*splits: str, digits: bool = False) -> pre_tokenizers.PreTokenizer:
    steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
    if digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits)])


# The pre-tokenizers of the models, by their names in a GGUF file, from the components of the tokenizers library.
PRE_TOKENIZERS: Mapping[str, pre_tokenizers.PreTokenizer] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "olmo": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": _byte_level(digits=True),
    "refact": _byte_level(digits=True),
    "llama-bpe": _byte_level(_CL100K),
    "smaug-bpe": _byte_level(_CL100K),
    "dbrx": _byte_level(_CL100K),
    "qwen2": _byte_level(_QWEN2),
    "deepseek-r1-qwen": _byte_level(_QWEN2),
    "gpt-4o": _byte_level(_O200K),
    "tekken": _byte_level(_TEKKEN),
    "deepseek-coder": _byte_level(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", digits=True),
    "deepseek-v3": _byte_level(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_V3),
}
# A piece that is in the vocabulary is one token; text is normalized to NFC.
WHOLE_WORDS = ("llama-bpe", "smaug-bpe", "tekken")
NFC = ("qwen2", "deepseek-r1-qwen", "olmo")


def byte_level(
    pre: str = "gpt-2",
    control: Sequence[str] = ("<s>", "<|endoftext|>", "<|im_end|>"),
    user_defined: Sequence[str] = ("<think>",),
) -> tuple[Tokenizer, dict[str, Any]]:
    """A byte-level BPE tokenizer of about 900 tokens, as in a model's tokenizer.json, and as GGUF fields.

    The control tokens come first, the user-defined ones last. The first is the BOS, the second the EOS.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre in WHOLE_WORDS))
    if pre in NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        SAMPLES,
        trainers.BpeTrainer(
            vocab_size=900,
            min_frequency=2,
            special_tokens=list(control),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user_defined])
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] * len(control)
        + [NORMAL] * (len(tokens) - len(control) - len(user_defined))
        + [USER_DEFINED] * len(user_defined),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }
    return tokenizer, fields


def sentencepiece(further_control: Sequence[str] = ()) -> tuple[Tokenizer, dict[str, Any]]:
    """A tokenizer like Llama 2's, of about 600 tokens, 256 of them bytes, and the same as GGUF fields.

    Tokens 0 to 2 are ``<unk>``, ``<s>`` and ``</s>``. The order of merges is that of the scores, not of the ids. With
    further control tokens it is like that of Mistral 7B Instruct v0.3: a space only at the start of a text.
    """
    # Other scripts fall back to bytes; control tokens of other models are not learned as words.
    latin = [text for text in SAMPLES if text.isascii() and "<|" not in text]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    learner.train_from_iterator(latin, trainers.BpeTrainer(vocab_size=800, min_frequency=2, show_progress=False))
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    merged = [left + right for left, right in merges]
    letters = sorted(set(model["vocab"]) - set(merged))
    control = ["<unk>", "<s>", "</s>", *further_control]
    tokens = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *reversed(merged)]
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(control)
    if further_control:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2]
        + [CONTROL] * (len(control) - 1)
        + [BYTE] * 256
        + [NORMAL] * (len(letters) + len(merged)),
        "tokenizer.ggml.scores": [0.0] * (len(control) + 256)
        + [-1000.0] * len(letters)
        + [-float(rank) for rank in reversed(range(len(merged)))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return tokenizer, fields


def unigram() -> tuple[Tokenizer, dict[str, Any]]:
    """A SentencePiece tokenizer of the kind Unigram, and the same as GGUF fields, whose scores are float32.

    Its tokens are those of `sentencepiece` up to the bytes, then frequent parts of words. (The library's trainer makes
    other ones in every process.)
    """
    words = [f"▁{word}" for text in SAMPLES if text.isascii() for word in text.split()]
    counts = Counter(
        word[start:end] for word in words for start in range(len(word)) for end in range(start + 1, start + 5)
    )
    frequent = sorted(piece for piece, count in counts.items() if count > 3 or len(piece) == 1)
    scores = [math.log(counts[piece] / len(words)) - 4 - i / 4096 for i, piece in enumerate(frequent)]
    learned = [
        (piece, struct.unpack("<f", struct.pack("<f", score))[0]) for piece, score in zip(frequent, scores, strict=True)
    ]
    control = ["<unk>", "<s>", "</s>"]
    others = [(token, 0.0) for token in (*control, *(f"<0x{byte:02X}>" for byte in range(256)))]
    vocabulary = others + learned
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.add_special_tokens(control)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fields = {
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
        "tokenizer.ggml.token_type": [2, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(learned),
        "tokenizer.ggml.scores": [score for _, score in vocabulary],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return tokenizer, fields


def character_map(replacements: Mapping[str, str]) -> bytes:
    """SentencePiece's ``precompiled_charsmap``: a trie over UTF-8 as a double array, then the texts.

    Unit of a byte: label, bit 8 for the end of a key, and from bit 10 on the distance (xor) to its children's block;
    the block's unit 0 has the place of the text. Source: Darts-clone, https://github.com/s-yata/darts-clone.
    """
    blocks, units, texts = {b"": 256}, {0: 256 << 10}, b""
    for character, text in replacements.items():
        key = character.encode()
        for i, byte in enumerate(key):
            place, children = blocks[key[:i]] ^ byte, blocks.setdefault(key[: i + 1], 256 * (len(blocks) + 1))
            units[place] = (place ^ children) << 10 | byte | units.get(place, 0) & 256
        units[blocks[key[:-1]] ^ key[-1]] |= 256
        units[blocks[key]] = len(texts) | 1 << 31
        texts += text.encode() + b"\0"
    count = 256 * (len(blocks) + 1)
    return struct.pack(f"<I{count}I", 4 * count, *(units.get(i, 0) for i in range(count))) + texts


def sentencepiece_file(
    fields: Mapping[str, Any], trainer: Mapping[int, int] | None = None, normalizer: Mapping[int, Any] | None = None
) -> bytes:
    """The tokenizer.model of GGUF fields.

    Args:
        fields: of `sentencepiece`.
        trainer, normalizer: settings to add or replace, by number.
    """
    ids = {40: "unknown", 41: "bos", 42: "eos", 43: "padding"}
    settings: dict[int, Any] = {3: 2, 35: 1}  # BPE, byte fallback
    settings |= {number: fields.get(f"tokenizer.ggml.{name}_token_id", -1) for number, name in ids.items()}
    pieces = zip(
        *(fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")),
        strict=True,
    )
    return (
        b"".join(_message({1: _message(dict(zip((1, 2, 3), piece, strict=True)))}) for piece in pieces)
        + _message({2: _message(settings | dict(trainer or {}))})
        + _message({3: _message({1: "identity", 3: 1} | dict(normalizer or {}))})
    )


def _message(fields: Mapping[int, Any]) -> bytes:
    """Fields in the wire format of Protocol Buffers."""
    data = b""
    for number, value in fields.items():
        match value:
            case int():
                data += _varint(number << 3) + _varint(value % (1 << 64))
            case float():
                data += _varint(number << 3 | 5) + struct.pack("<f", value)
            case _:
                content = value.encode() if isinstance(value, str) else value
                data += _varint(number << 3 | 2) + _varint(len(content)) + content
    return data


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + _varint(value >> 7)
