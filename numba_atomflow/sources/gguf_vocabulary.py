"""The vocabulary of a GGUF file: the tokens, their types, and which of them the file names."""

from dataclasses import dataclass, field

from numba_atomflow.errors import SourceError
from numba_atomflow.files.untrusted import short
from numba_atomflow.sources.gguf_fields import GgufFields

BYTE_LEVEL, BPE, UNIGRAM = "gpt2", "llama", "t5"  # tokenizer.ggml.model; the last two are SentencePiece's
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # tokenizer.ggml.token_type

_ID_SUFFIX = "_token_id"  # of keys that name a token
_SENTENCEPIECE_IDS = {"unknown": (0, "<unk>"), "bos": (1, "<s>"), "eos": (2, "</s>")}  # if the file names none


@dataclass
class Vocabulary:
    """The tokens by id, and their properties.

    Attributes:
        types: token types, corrected for tokens whose name implies another type.
        ids: of the tokens that the file names, such as "bos"; all are valid.
        by_text: id of every token except padding.
        warnings: sentences for the user.
    """

    fields: GgufFields
    tokens: list[str]
    types: list[int]
    ids: dict[str, int] = field(default_factory=dict)
    by_text: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def special(self, name: str) -> str | None:
        """Text of the token that the file names ``<name>_token_id``, or None."""
        return self.tokens[self.ids[name]] if name in self.ids else None

    def warn(self, what: str) -> None:
        self.warnings.append(f"{self.fields.label} {what}.")

    def make_control(self, token_id: int, why: str) -> None:
        """Change a token of another type to a control token: never split, and omitted from decoded text."""
        if self.types[token_id] in (NORMAL, USER_DEFINED):
            self.types[token_id] = CONTROL
            self.warn(f"does not mark token {token_id} ({short(self.tokens[token_id])}) as a control token; {why}")


def read_vocabulary(fields: GgufFields, kind: str) -> Vocabulary:
    """The vocabulary, with the tokens that the file names.

    Raises:
        SourceError: lists of different lengths, or two tokens with the same text.
    """
    tokens = fields.required_items("tokenizer.ggml.tokens", str)
    types = list(fields.items("tokenizer.ggml.token_type", int) or [NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise SourceError(f"{fields.label} has {len(tokens)} tokens but {len(types)} token types; get the file again.")
    vocabulary = Vocabulary(fields, tokens, types)
    for i, token in enumerate(tokens):
        if token == "" or (types[i] == UNUSED and token == f"[PAD{i}]"):
            continue  # padding of the embedding, without text
        first = vocabulary.by_text.setdefault(token, i)
        if first != i:
            raise SourceError(
                f"{fields.label} has two tokens with the text {short(token)}, {first} and {i}; take another file."
            )
    _name_tokens(vocabulary, kind)
    return vocabulary


def _name_tokens(vocabulary: Vocabulary, kind: str) -> None:
    """Fill in `ids`. An id outside the vocabulary (such as -1 for "none") is ignored with a warning."""
    fields = vocabulary.fields
    prefix = "tokenizer.ggml."
    for key in fields.values:
        if not key.startswith(prefix) or not key.endswith(_ID_SUFFIX):
            continue
        token_id = fields.value(key, int, -1)
        if 0 <= token_id < len(vocabulary.tokens):
            vocabulary.ids[key.removeprefix(prefix).removesuffix(_ID_SUFFIX)] = token_id
        else:
            vocabulary.warn(f"has {short(key)} {token_id}, outside its {len(vocabulary.tokens)} tokens: ignored")
    if kind != BYTE_LEVEL:
        for name, (token_id, text) in _SENTENCEPIECE_IDS.items():
            if name not in vocabulary.ids and vocabulary.by_text.get(text) == token_id:
                vocabulary.ids[name] = token_id
        if "unknown" in vocabulary.ids and vocabulary.types[vocabulary.ids["unknown"]] == NORMAL:
            vocabulary.types[vocabulary.ids["unknown"]] = UNKNOWN
    elif "bos" not in vocabulary.ids and "<|begin_of_text|>" in vocabulary.by_text:
        vocabulary.ids["bos"] = vocabulary.by_text["<|begin_of_text|>"]
    if "bos" in vocabulary.ids:
        mark_control_if_bracketed(vocabulary, vocabulary.ids["bos"], "it begins texts, so it is treated as one")


def mark_control_if_bracketed(vocabulary: Vocabulary, token_id: int, why: str) -> None:
    """A token that the file names is a control token, unless it looks like text: then its id is a mistake."""
    token = vocabulary.tokens[token_id]
    if len(token) > 2 and token[0] + token[-1] in ("<>", "[]"):
        vocabulary.make_control(token_id, why)
