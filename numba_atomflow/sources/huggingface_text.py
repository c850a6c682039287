"""Tokenizer, chat template and end-of-reply ids of a Hugging Face model folder.

Every file is optional: a model without them can still be fed token ids.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numba_atomflow.errors import SourceError, TextError
from numba_atomflow.foreign import shown
from numba_atomflow.plain_text import decode_text
from numba_atomflow.sources.json_file import parse_json, read_file
from numba_atomflow.text import TextAssets

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
TEXT_FILES = (TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS, GENERATION_CONFIG, CHAT_TEMPLATE)

_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def folder_text(folder: Path, config: Mapping[str, Any], vocabulary: int) -> tuple[TextAssets, tuple[Path, ...]]:
    """Text assets of a model folder, and the files that they came from.

    Args:
        folder: the model's folder.
        config: its config.json.
        vocabulary: number of rows of the embedding; token ids must be below.

    Raises:
        SourceError: a file is malformed, or an end-of-reply id is no number.
    """
    contents = {name: read_file(folder / name) for name in TEXT_FILES if (folder / name).exists()}
    records = {name: parse_json(folder / name, data) for name, data in contents.items() if name != CHAT_TEMPLATE}

    tokenizer_config = records.get(TOKENIZER_CONFIG, {})
    tokens = _special_tokens(records.get(SPECIAL_TOKENS, {}) | tokenizer_config)
    eos_ids, warnings = _eos_ids(folder, records, config, tokens["eos_token"], vocabulary)
    assets = TextAssets(
        tokenizer_json=contents.get(TOKENIZER),
        chat_template=_chat_template(folder, contents, tokenizer_config),
        eos_ids=eos_ids,
        add_bos=tokenizer_config.get("add_bos_token") is True,
        **tokens,
        warnings=warnings,
    )
    return assets, tuple(folder / name for name in contents)


def _special_tokens(record: Mapping[str, Any]) -> dict[str, str | None]:
    """Special tokens by name; a record holds either the text or an object with the text as `content`."""
    tokens: dict[str, str | None] = {}
    for name in _TOKEN_NAMES:
        value = record.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        tokens[name] = value if isinstance(value, str) else None
    return tokens


def _chat_template(folder: Path, contents: Mapping[str, bytes], tokenizer_config: Mapping[str, Any]) -> str | None:
    """The template file if there is one, else that in tokenizer_config.json (of several, the one named default)."""
    if CHAT_TEMPLATE in contents:
        try:
            return decode_text(contents[CHAT_TEMPLATE], str(folder / CHAT_TEMPLATE))
        except TextError as error:
            raise SourceError(str(error)) from error
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        template = next(
            (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None
        )
    return template if isinstance(template, str) else None


def _eos_ids(
    folder: Path,
    records: Mapping[str, Mapping[str, Any]],
    config: Mapping[str, Any],
    eos_token: str | None,
    vocabulary: int,
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Ids from generation_config.json, or else config.json, and that of the tokenizer's own end token; and warnings.

    An id that the vocabulary has not can never be sampled: transformers loads such a model, and so does this program.
    """
    value = records.get(GENERATION_CONFIG, {}).get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id")
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int for item in listed):
        raise SourceError(f"{folder} has an unusable eos_token_id: {shown(value)}; it must be a token id.")
    ids: set[int] = set(listed)
    added = records.get(TOKENIZER, {}).get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and token.get("content") == eos_token and type(token.get("id")) is int:
            ids.add(token["id"])
    outside = sorted(token_id for token_id in ids if not 0 <= token_id < vocabulary)
    warnings = tuple(
        f"{folder} has the eos_token_id {shown(token_id)}, outside its vocabulary of {vocabulary} tokens; "
        "it is ignored."
        for token_id in outside
    )
    return tuple(sorted(ids.difference(outside))), warnings
