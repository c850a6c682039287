"""Tokenizer, chat template and EOS ids of a Hugging Face model folder.

Every file is optional: a model without a tokenizer takes token ids.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from numba_atomflow.errors import SourceError, TextError
from numba_atomflow.files.text_input import decode_text
from numba_atomflow.files.untrusted import quote
from numba_atomflow.sources.huggingface_tokens import (
    ADDED_TOKENS,
    SPECIAL_TOKENS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    CompleteTokenizer,
    Records,
    folder_tokens,
)
from numba_atomflow.sources.huggingface_vocabulary import folder_vocabulary
from numba_atomflow.sources.json_file import flag, parse_json, read_file, unusable
from numba_atomflow.text.codec import TextAssets

GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
OLD_CHAT_TEMPLATE = "chat_template.json"
TEXT_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
    ADDED_TOKENS,
    GENERATION_CONFIG,
    CHAT_TEMPLATE,
    OLD_CHAT_TEMPLATE,
)
# Tokens with a field of their own in `TextAssets`, and other variables of a chat template.
_RESERVED_NAMES = (
    *("bos_token", "eos_token", "unk_token", "pad_token"),
    *("messages", "tools", "documents", "add_generation_prompt"),
)


def folder_text(folder: Path, config: Mapping[str, Any], vocabulary: int) -> tuple[TextAssets, tuple[Path, ...]]:
    """Text assets of a model folder, and their files.

    Args:
        folder: the model's folder.
        config: its config.json.
        vocabulary: number of rows of the embedding, above all token ids.

    Raises:
        SourceError: a file is malformed, files conflict, or the vocabulary is in another format.
    """
    contents = {name: read_file(folder / name) for name in TEXT_FILES if (folder / name).exists()}
    records = {name: parse_json(folder / name, data) for name, data in contents.items() if name != CHAT_TEMPLATE}
    tokenizer_config = records.get(TOKENIZER_CONFIG, {})
    read = None
    if TOKENIZER not in contents:
        read = folder_vocabulary(folder, config, tokenizer_config, folder / TOKENIZER_CONFIG)

    tokens = folder_tokens(folder, records)
    special = tokens.texts() if read is None else read.assets.special_tokens() | tokens.texts()
    add_bos = flag(
        folder / TOKENIZER_CONFIG, tokenizer_config, "add_bos_token", read is not None and read.assets.add_bos
    )
    data, ids = None, dict[str, int]()
    stored = contents.get(TOKENIZER) if read is None else read.assets.tokenizer_json
    if stored is not None:
        path = folder / TOKENIZER if read is None else read.path
        record = records[TOKENIZER] if read is None else parse_json(path, stored)
        tokenizer = CompleteTokenizer(path, stored, record, tokens)
        data, ids = tokenizer.data, tokenizer.ids
        if add_bos and special.get("bos_token") in tokenizer.unlisted:
            raise SourceError(
                f"{folder} asks for a BOS before every text, but its tokenizer lacks {quote(special['bos_token'])}; "
                "get the complete model, or set add_bos_token to false."
            )
    listed = _listed_eos_ids(folder, records, config)
    eos_ids = {*listed, *(ids[text] for text in _end_tokens(folder, records, special) if text in ids)}
    assets = TextAssets(
        tokenizer_json=data,
        chat_template=_chat_template(folder, contents, records),
        bos_token=special.get("bos_token"),
        eos_token=special.get("eos_token"),
        unk_token=special.get("unk_token"),
        pad_token=special.get("pad_token"),
        eos_ids=tuple(sorted(token_id for token_id in eos_ids if 0 <= token_id < vocabulary)),
        add_bos=add_bos and bool(special.get("bos_token")),
        other_tokens={name: text for name, text in special.items() if name not in _RESERVED_NAMES},
        warnings=(
            *_eos_warnings(folder, listed, vocabulary),
            *_token_warnings(folder, ids, vocabulary),
            *_text_warnings(folder, records, has_tokenizer=data is not None),
            *(() if read is None else read.assets.warnings),
            *_bos_warnings(folder, special, add_bos=add_bos),
        ),
    )
    return assets, (*(folder / name for name in contents), *(() if read is None else read.files))


# --- chat template -------------------------------------------------------------------------------------------------


def _chat_template(folder: Path, contents: Mapping[str, bytes], records: Records) -> str | None:
    """The template of the first file that has one: chat_template.jinja, tokenizer_config.json, chat_template.json."""
    if CHAT_TEMPLATE in contents:
        try:
            text = decode_text(contents[CHAT_TEMPLATE], str(folder / CHAT_TEMPLATE))
        except TextError as error:
            raise SourceError(str(error)) from error
        if text:
            return text
    for name in (TOKENIZER_CONFIG, OLD_CHAT_TEMPLATE):
        template = _default_template(folder / name, records.get(name, {}).get("chat_template"))
        if template:
            return template
    return None


def _default_template(path: Path, value: Any) -> str | None:
    """The template; of several, in a list of records or by name, the one named "default"."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = next((item.get("template") for item in value if item.get("name") == "default"), None)
    elif isinstance(value, dict):
        value = value.get("default")
    if value is not None and not isinstance(value, str):
        raise unusable(path, "chat_template", value)
    return value


# --- ids -----------------------------------------------------------------------------------------------------------


def _listed_eos_ids(folder: Path, records: Records, config: Mapping[str, Any]) -> list[int]:
    """The EOS ids of generation_config.json, or else of config.json."""
    value = records.get(GENERATION_CONFIG, {}).get("eos_token_id")
    if value is None or value == []:
        value = config.get("eos_token_id")
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int for item in listed):
        raise SourceError(f"{folder} has an unusable eos_token_id: {quote(value)}; it must be a token id.")
    return listed


def _end_tokens(folder: Path, records: Records, special: Mapping[str, str]) -> tuple[str, ...]:
    """The EOS token of the tokenizer; without one, that of special_tokens_map.json."""
    if "eos_token" in special:
        return (special["eos_token"],)
    other = folder_tokens(folder, {SPECIAL_TOKENS: records.get(SPECIAL_TOKENS, {})}).texts()
    return (other["eos_token"],) if "eos_token" in other else ()


def _eos_warnings(folder: Path, listed: list[int], vocabulary: int) -> Iterator[str]:
    """Ids beyond the embedding are never sampled; as in transformers, the model is still loaded."""
    for token_id in sorted(set(listed)):
        if not 0 <= token_id < vocabulary:
            yield (
                f"{folder} has the eos_token_id {quote(token_id)}, outside its vocabulary of {vocabulary} tokens; "
                "it is ignored."
            )


def _text_warnings(folder: Path, records: Records, *, has_tokenizer: bool) -> Iterator[str]:
    if not has_tokenizer:
        yield f"{folder} holds no {TOKENIZER}: its checkpoint takes token ids, not `generate` or `chat`."
    if flag(folder / TOKENIZER_CONFIG, records.get(TOKENIZER_CONFIG, {}), "split_special_tokens"):
        yield (
            f"{folder / TOKENIZER_CONFIG} sets split_special_tokens, which is ignored: a special token in a text "
            "becomes that token."
        )


def _bos_warnings(folder: Path, special: Mapping[str, str], *, add_bos: bool) -> Iterator[str]:
    if add_bos and not special.get("bos_token"):
        yield (
            f"{folder / TOKENIZER_CONFIG} sets add_bos_token, but the folder names no bos_token: texts are encoded as "
            f"{TOKENIZER} says."
        )


def _token_warnings(folder: Path, ids: Mapping[str, int], vocabulary: int) -> Iterator[str]:
    outside = [text for text, token_id in ids.items() if token_id >= vocabulary]
    if outside:
        more = f" and {len(outside) - 1} more tokens" if len(outside) > 1 else ""
        yield (
            f"{folder} has the token {quote(outside[0])}{more} beyond the {vocabulary} rows of its embedding; "
            "a text with such a token will be refused."
        )
