"""tokenizer.model: SentencePiece's own file of a tokenizer, as the metadata that a GGUF file has of it.

Messages and their defaults: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto. Token
types of GGUF are those numbers. Supported are BPE, which is what Llama, Mistral, Gemma and Phi-3 have, and Unigram.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from numba_atomflow.errors import SourceError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.sources.protobuf import message_fields

# Numbers of fields.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # of the model
_PIECE, _SCORE, _TYPE = 1, 2, 3  # of a piece
_MODEL_TYPE, _SUFFIX = 3, 24  # of the trainer: kind of model; ▁ ends words
_IDS = {"unknown": (40, 0), "bos": (41, 1), "eos": (42, 2), "padding": (43, -1)}  # of the trainer, with defaults
_NAME, _CHARACTER_MAP, _PREFIX, _SPACES = 1, 2, 3, 4  # of the normalizer; the last: spaces are removed

_UNIGRAM, _BPE = 1, 2
_KINDS = {3: "words", 4: "characters"}  # others
_NORMAL = 1
_SCORE_LAYOUT = struct.Struct("<f")
MAX_PIECES = 1 << 20  # four times the largest vocabulary
_TIKTOKEN = b"IQ== 0\n"  # the first line of Llama 3's original tokenizer.model: base64 and rank


class _Piece(NamedTuple):
    text: str
    score: float
    type: int


def sentencepiece_fields(path: Path, data: bytes) -> dict[str, Any]:
    """The GGUF metadata (``tokenizer.ggml.*``) of a tokenizer.model.

    Args:
        path: for messages.
        data: the file's bytes.

    Raises:
        SourceError: the file is damaged, or its kind is not supported.
    """
    advice = "make a tokenizer.json with transformers"
    if data.startswith(_TIKTOKEN):
        raise SourceError(f"{path} is a vocabulary of tiktoken, which lacks the special tokens; get tokenizer.json.")
    try:
        pieces, trainer, normalizer = _model(data)
    except (ValueError, struct.error) as error:
        raise SourceError(f"{path} is not a SentencePiece model, or damaged ({error}); get the file again.") from error
    kind = trainer.get(_MODEL_TYPE, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE):
        raise SourceError(
            f"{path} is a SentencePiece model of the kind {_KINDS.get(kind, quote(kind))}, where only BPE and Unigram "
            f"are supported; {advice}."
        )
    if kind == _BPE and normalizer.get(_CHARACTER_MAP):
        name = normalizer.get(_NAME, b"").decode(errors="replace")
        raise SourceError(f"{path} replaces characters ({quote(name)}), which is not supported; {advice}.")
    if trainer.get(_SUFFIX):
        raise SourceError(f"{path} puts spaces at the ends of words, which is not supported; {advice}.")
    ids = {name: _signed(trainer.get(number, default)) for name, (number, default) in _IDS.items()}
    settings: dict[str, Any] = {"tokenizer.ggml.model": "llama"}
    if kind == _UNIGRAM:
        settings = {
            "tokenizer.ggml.model": "t5",  # so called in GGUF files
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.remove_extra_whitespaces": bool(normalizer.get(_SPACES, 1)),
            "tokenizer.ggml.precompiled_charsmap": list(normalizer.get(_CHARACTER_MAP, b"")),
        }
    return {
        **settings,
        "tokenizer.ggml.tokens": [piece.text for piece in pieces],
        "tokenizer.ggml.scores": [piece.score for piece in pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in pieces],
        "tokenizer.ggml.add_space_prefix": bool(normalizer.get(_PREFIX, 1)),
    } | {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if 0 <= i < len(pieces)}


def _model(data: bytes) -> tuple[list[_Piece], Mapping[int, Any], Mapping[int, Any]]:
    """The pieces, and the settings of trainer and normalizer by their numbers.

    Raises:
        ValueError, struct.error: the data are damaged.
    """
    pieces: list[_Piece] = []
    settings: dict[int, dict[int, Any]] = {}
    for number, value in message_fields(data):
        if number in (_PIECES, _TRAINER, _NORMALIZER) and not isinstance(value, bytes):
            raise ValueError(f"field {number} is a number")
        if number == _PIECES and isinstance(value, bytes):
            pieces.append(_piece(value))
            if len(pieces) > MAX_PIECES:
                raise ValueError(f"it has more than {MAX_PIECES} pieces")
        elif isinstance(value, bytes):
            settings[number] = dict(message_fields(value)) if number in (_TRAINER, _NORMALIZER) else {}
    if not pieces or not {_TRAINER, _NORMALIZER} <= settings.keys():
        raise ValueError("it ends before its settings")
    trainer, normalizer = settings[_TRAINER], settings[_NORMALIZER]
    integers = {_MODEL_TYPE, _SUFFIX, *(number for number, _ in _IDS.values())}
    for record, numbers, kind in (
        (trainer, integers, int),
        (normalizer, {_PREFIX, _SPACES}, int),
        (normalizer, {_NAME, _CHARACTER_MAP}, bytes),
    ):
        for number in numbers & record.keys():
            if type(record[number]) is not kind:
                raise ValueError(f"setting {number} has another type")
    return pieces, trainer, normalizer


def _piece(data: bytes) -> _Piece:
    record = dict(message_fields(data))
    text, score, kind = record.get(_PIECE, b""), record.get(_SCORE, bytes(4)), record.get(_TYPE, _NORMAL)
    if isinstance(text, bytes) and isinstance(score, bytes) and isinstance(kind, int):
        return _Piece(text.decode(), _SCORE_LAYOUT.unpack(score)[0], kind)
    raise ValueError("a field of a piece has another type")


def _signed(value: int) -> int:
    """An int32, which is stored as the 64 bits of its two's complement."""
    return value - (1 << 64) if value >= 1 << 63 else value
