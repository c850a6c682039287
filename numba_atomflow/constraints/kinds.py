"""The constraints: JSON schema, any JSON object, one of some texts, regular expression, grammar.

Each is a value that may be used for any number of replies, of any model.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numba_atomflow.constraints.matcher import Matcher, check_length, refused, require_llguidance
from numba_atomflow.errors import OptionError
from numba_atomflow.files.untrusted import load_json, quote
from numba_atomflow.text.token_table import TokenTable

MOST_GBNF_CHARACTERS = 1 << 14  # its conversion takes time in the square of the number of rules: 0.3 s at worst

# Any indentation, but no endless white space, which small models fall into.
WHITE_SPACE = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}


@dataclass(frozen=True)
class JsonSchema:
    """The reply is JSON that a schema accepts, without white space around it.

    Properties come in the order in which the schema lists them. Keywords that llguidance does not implement, such as
    `not` and `uniqueItems`, are refused.

    Args:
        schema: a mapping, or the same as a JSON text.

    Raises:
        OptionError: it is no JSON object, or too long. `start` refuses what is no schema.
    """

    schema: str | Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "schema", json_text(self.schema, "The JSON schema"))

    def start(self, tokens: TokenTable) -> Matcher:
        """The state at the beginning of a reply."""
        what, library = "The JSON schema", require_llguidance()
        try:
            grammar = library.LLMatcher.grammar_from_json_schema(self.schema, overrides=WHITE_SPACE)
        except ValueError as error:
            raise refused(what, str(error)) from error
        return Matcher(grammar, tokens, what)


@dataclass(frozen=True)
class JsonObject:
    """The reply is a JSON object of any contents."""

    def start(self, tokens: TokenTable) -> Matcher:
        """The state at the beginning of a reply."""
        return JsonSchema({"type": "object"}).start(tokens)


@dataclass(frozen=True)
class Choice:
    """The reply is one of these texts.

    Raises:
        OptionError: there are none, one is empty or no text, or they are too long.
    """

    texts: Sequence[str]

    def __post_init__(self) -> None:
        given: object = self.texts
        texts = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else ()
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise OptionError(f"The choice of texts is {quote(self.texts)}; give a list of texts that are not empty.")
        check_length("".join(texts), "The choice of texts")
        _check_unicode("".join(texts), "The choice of texts")
        object.__setattr__(self, "texts", texts)

    def start(self, tokens: TokenTable) -> Matcher:
        """The state at the beginning of a reply."""
        grammar = "start: " + " | ".join(literal(text) for text in self.texts)
        return Matcher(require_llguidance().LLMatcher.grammar_from_lark(grammar), tokens, "The choice of texts")


@dataclass(frozen=True)
class Regex:
    """The whole reply matches a regular expression, in the syntax of Rust's `regex`, without look-around.

    Raises:
        OptionError: it is no text, empty, or too long. `start` refuses what is no expression.
    """

    pattern: str

    def __post_init__(self) -> None:
        _require_text(self.pattern, "The regular expression")

    def start(self, tokens: TokenTable) -> Matcher:
        """The state at the beginning of a reply."""
        grammar = require_llguidance().LLMatcher.grammar_from_regex(self.pattern)
        return Matcher(grammar, tokens, "The regular expression")


@dataclass(frozen=True)
class Grammar:
    """The whole reply matches a grammar: Lark's syntax with llguidance's extensions, or llama.cpp's GBNF.

    Raises:
        OptionError: it is no text, empty, or too long. `start` refuses what is no grammar.
    """

    text: str

    def __post_init__(self) -> None:
        _require_text(self.text, "The grammar")

    def start(self, tokens: TokenTable) -> Matcher:
        """The state at the beginning of a reply."""
        what, library = "The grammar", require_llguidance()
        return Matcher(library.LLMatcher.grammar_from_lark(_lark(self.text, what)), tokens, what)


def _lark(text: str, what: str) -> str:
    """A grammar in Lark's syntax.

    Raises:
        OptionError: it is malformed GBNF, or too long for GBNF.
    """
    from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark, is_lark_syntax

    if is_lark_syntax(text):
        return text
    check_length(text, f"{what} (GBNF)", MOST_GBNF_CHARACTERS)
    try:
        lark: str = gbnf_to_lark(text)
    except GbnfToLarkError as error:
        raise refused(what, f"neither Lark, which begins with `start:`, nor GBNF: {error}") from error
    except Exception as error:  # RecursionError, and plain ones for a missing rule
        raise refused(what, str(error)) from error
    return lark


def literal(text: str) -> str:
    """A text as a string of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def _require_text(value: object, what: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise OptionError(f"{what} is {quote(value)}; give a text that is not empty.")
    check_length(value, what)
    _check_unicode(value, what)


def _check_unicode(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise refused(what, "it holds half of a surrogate pair, which is no text") from None


def json_text(schema: object, what: str) -> str:
    """A schema as a JSON text; `what` is its name in a message.

    Raises:
        OptionError: it is no JSON object, or too long.
    """
    try:
        if isinstance(schema, str):
            check_length(schema, what)
            schema = load_json(schema)
        if not isinstance(schema, Mapping):
            raise OptionError(f"{what} is {quote(schema)}; it must be a JSON object.")
        text = json.dumps(dict(schema), ensure_ascii=False, allow_nan=False)
        text.encode()
    except RecursionError:
        raise refused(what, "its values are nested too deeply") from None
    except UnicodeEncodeError:
        raise refused(what, "it holds half of a surrogate pair, which is no text") from None
    except (TypeError, ValueError) as error:
        raise refused(what, f"no JSON: {error}") from error
    check_length(text, what)
    return text
