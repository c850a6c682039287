"""Text to tokens and back: tokenizer, chat template, detokenizer.

`TextAssets` is the text part of a model, read from a source and stored in a checkpoint; `TextCodec` is built from it.
The tokenizers library is imported with the first codec, Jinja with the first chat: importing this module is cheap.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from numba_atomflow.errors import CheckpointError, OptionError, TextError
from numba_atomflow.files.untrusted import quote, short
from numba_atomflow.host.free_memory import return_free_memory
from numba_atomflow.text.detokenizer import Detokenizer, TokenBytes
from numba_atomflow.text.special_as_text import SpecialAsText
from numba_atomflow.text.tokenizers_library import check_growth, translate_errors
from numba_atomflow.utils.arguments import whole_numbers

if TYPE_CHECKING:
    from numba_atomflow.text.chat_template import ChatTemplate


@dataclass(frozen=True)
class TextAssets:
    """The tokenizer, chat template and special tokens of a model; each may be missing."""

    tokenizer_json: bytes | None = field(default=None, repr=False)  # contents of a Hugging Face tokenizer.json
    chat_template: str | None = None  # Jinja source
    bos_token: str | None = None
    eos_token: str | None = None
    unk_token: str | None = None
    pad_token: str | None = None
    eos_ids: tuple[int, ...] = ()  # each ends a generation
    add_bos: bool = False  # encode puts bos_token first, even if tokenizer.json does not
    # Further named tokens, for chat templates: sep_token, cls_token, ...
    other_tokens: Mapping[str, str] = field(default_factory=dict)
    # Settings of the source that are ignored, one sentence each; not stored in a checkpoint.
    warnings: tuple[str, ...] = field(default=(), repr=False, compare=False)

    def special_tokens(self) -> dict[str, str]:
        """The named special tokens that exist, for chat templates: ``{"bos_token": "<s>", ...}``."""
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None} | dict(
            self.other_tokens
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready record that a checkpoint stores, without ``tokenizer_json``, which is stored as bytes."""
        record = asdict(self)
        del record["tokenizer_json"], record["warnings"]
        if not self.other_tokens:  # the format of earlier versions
            del record["other_tokens"]
        return record | {"eos_ids": list(self.eos_ids)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], tokenizer_json: bytes | None) -> "TextAssets":
        """The inverse of `to_dict`.

        Raises:
            CheckpointError: a field is unknown or of a wrong type.
        """
        texts = ("chat_template", "bos_token", "eos_token", "unk_token", "pad_token")
        for name, value in record.items():
            if name in texts:
                valid = value is None or isinstance(value, str)
            elif name == "eos_ids":
                valid = isinstance(value, list) and all(type(token_id) is int and token_id >= 0 for token_id in value)
            elif name == "other_tokens":
                valid = isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
            else:
                valid = name == "add_bos" and isinstance(value, bool)
            if not valid:
                raise CheckpointError(
                    f"The checkpoint's text record has an unusable {short(name)}: {quote(value)}; convert the model "
                    "again."
                )
        return cls(**dict(record) | {"tokenizer_json": tokenizer_json, "eos_ids": tuple(record.get("eos_ids", ()))})


class TextCodec:
    """Encodes and decodes for one model.

    Raises:
        TextError: the assets have no tokenizer, or an unusable one.
    """

    def __init__(self, assets: TextAssets) -> None:
        if assets.tokenizer_json is None:
            raise TextError("The model has no tokenizer: add tokenizer.json to its source folder and convert it again.")
        from tokenizers import Tokenizer

        self.assets = assets
        self.eos_ids = frozenset(assets.eos_ids)
        with translate_errors("The model's tokenizer.json cannot be read", "fetch the model again"):
            self._tokenizer = Tokenizer.from_buffer(assets.tokenizer_json)
            # Some tokenizer.json files keep settings of the training run: truncation, padding, BPE dropout.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            if getattr(self._tokenizer.model, "dropout", None):
                self._tokenizer.model.dropout = None
            check_growth(self._tokenizer)
            self._post_processor_adds = self._tokenizer.num_special_tokens_to_add(is_pair=False) > 0
            self._token_bytes = TokenBytes(self._tokenizer)
        return_free_memory()  # half of what reading tokenizer.json took
        self._bos_id = self._find_bos()

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, added ones included; the embedding may have more rows."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def vocabulary(self) -> dict[str, int]:
        """The id of every token, added ones included."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: n tokens stand for at most n times as many.

        Not where a tokenizer makes one token of a text of any length, such as unknown words, or drops parts of it.
        """
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)), default=1)

    @property
    def token_bytes(self) -> TokenBytes:
        """The bytes of each token."""
        return self._token_bytes

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text. A special token that is spelled in the text becomes that token.

        Args:
            text: any text; "" gives no tokens (or only the BOS).
            add_special: put the BOS first if the model uses one; never a second one.

        Raises:
            TextError: the text has a lone surrogate, which is not valid Unicode, or the tokenizer fails on it.
        """
        with translate_errors("The model's tokenizer cannot encode the text", "fetch the model again"):
            try:
                encoding = self._tokenizer.encode(text, add_special_tokens=add_special)
            except TypeError as error:
                index = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
                if index is None:
                    raise
                raise TextError(
                    f"Character {index + 1} of the text is half of a surrogate pair; give the text as valid UTF-8."
                ) from error
        ids: list[int] = encoding.ids
        if add_special and self._post_processor_adds:
            mask = encoding.special_tokens_mask
            prefix = mask.index(0) if 0 in mask else 0  # number of tokens that the post-processor put first
            if ids[:prefix] == ids[prefix : 2 * prefix]:  # the text begins with them as well
                del ids[:prefix]
        if add_special and self._bos_id is not None and ids[:1] != [self._bos_id]:
            ids.insert(0, self._bos_id)
        return ids

    def encode_pair(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and of what follows it, as lm-evaluation-harness has them (`TemplateLM._encode_pair`).

        White space at the end of the prompt begins the continuation. The prompt is encoded by itself; the tokens of the
        continuation are those of both texts together, from as many on as the prompt has.

        Raises:
            OptionError: there are no tokens of the prompt, or none of the continuation.
            TextError: as `encode`.
        """
        ending = len(prompt.rstrip())
        first, whole = self.encode(prompt[:ending]), self.encode(prompt + continuation)
        if not first:
            raise OptionError("The prompt is empty, and the model has no BOS to begin with; give some text.")
        if len(whole) <= len(first):
            raise OptionError(f"The continuation {quote(continuation)} has no tokens of its own after its prompt.")
        return first, whole[len(first) :]

    def token_id(self, spelling: str) -> int | None:
        """The id of a vocabulary entry, or None."""
        try:
            token_id: int | None = self._tokenizer.token_to_id(spelling)
        except UnicodeEncodeError:  # a lone surrogate, which no vocabulary has
            return None
        return token_id

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of a complete token sequence; bytes that are not UTF-8 become U+FFFD.

        Raises:
            OptionError: the ids are not whole numbers.
            TextError: an id is not that of a token, or the tokenizer fails.
        """
        token_ids = whole_numbers(ids)
        with translate_errors("The model's tokenizer cannot decode the tokens", "give token ids of this model"):
            text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special)
        return text

    def stream(self) -> Detokenizer:
        """A detokenizer for the tokens of one generation, as they arrive."""
        return Detokenizer(self._token_bytes)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        template_variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Format a conversation by the model's chat template: see `ChatTemplate.render`.

        Raises:
            TextError: the model has no chat template, a message is malformed, or the template raises an error.
            OptionError: a template variable cannot be used.
        """
        return self._chat_template.render(messages, add_generation_prompt, template_variables)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        template_variables: Mapping[str, Any] | None = None,
        *,
        allow_special: bool = True,
        check: Callable[[str], None] = lambda text: None,
    ) -> list[int]:
        """Token ids of a conversation, up to the assistant's reply. The template writes the BOS.

        Args:
            messages, template_variables: see `ChatTemplate.render`.
            allow_special: a special token that is spelled in them becomes that token, as in transformers. Otherwise it
                is encoded as text, for messages of people who are not trusted.
            check: called with the text that the template has made of them, before it is encoded; may raise.

        Raises:
            TextError, OptionError: as `render_chat`, and as `encode`.
        """
        if allow_special:
            rendered = self.render_chat(messages, template_variables=template_variables)
            check(rendered)
            return self.encode(rendered, add_special=False)
        marks: list[str] = []

        def escape(value: Any) -> Any:
            escaped = self._special_as_text.escape(value)
            if escaped.value != value:
                marks.append(escaped.mark)
            return escaped.value

        rendered = self._chat_template.render(messages, True, template_variables, escape)
        check(rendered)
        if not marks:  # the ordinary case
            return self.encode(rendered, add_special=False)
        with translate_errors("The model's tokenizer cannot encode the text", "fetch the model again"):
            return self._special_as_text.encode(rendered, marks[0])

    @cached_property
    def _special_as_text(self) -> SpecialAsText:
        with translate_errors("The model's tokenizer.json cannot be read", "fetch the model again"):
            return SpecialAsText(self._tokenizer)

    @cached_property
    def _chat_template(self) -> "ChatTemplate":
        if self.assets.chat_template is None:
            raise TextError(
                "The model has no chat template (a base model, not tuned for chat); give it plain text with `generate`."
            )
        from numba_atomflow.text.chat_template import ChatTemplate

        return ChatTemplate(self.assets.chat_template, self.assets.special_tokens())

    def _find_bos(self) -> int | None:
        """The id that `encode` puts first, or None.

        Raises:
            TextError: the model uses a BOS that the tokenizer lacks.
        """
        if not self.assets.add_bos:
            return None
        bos_id = self.token_id(self.assets.bos_token) if self.assets.bos_token else None
        if bos_id is None:
            raise TextError(
                f"The model asks for a BOS before every text, but its tokenizer lacks {quote(self.assets.bos_token)}."
            )
        return bos_id
