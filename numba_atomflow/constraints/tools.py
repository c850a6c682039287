"""A reply that calls tools and does nothing else, in the model's own notation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numba_atomflow.constraints.kinds import WHITE_SPACE, json_text, literal
from numba_atomflow.constraints.matcher import Matcher, check_length, require_llguidance
from numba_atomflow.errors import OptionError
from numba_atomflow.text.token_table import TokenTable
from numba_atomflow.text.tool_calls import ToolNotation

MOST_CALLS = 8  # in one reply, so that it ends


@dataclass(frozen=True)
class ToolCalls:
    """The reply is one or more calls of these tools, whose arguments satisfy the tools' schemas.

    Args:
        notation: the model's.
        tools: name and JSON schema of the arguments; a schema of None allows any object.
        several: up to `MOST_CALLS` calls; otherwise one.

    Raises:
        OptionError: there are no tools, or a schema is no JSON object or too long. `start` refuses what is no schema.
    """

    notation: ToolNotation
    tools: Sequence[tuple[str, Mapping[str, Any] | None]]
    several: bool = False

    def __post_init__(self) -> None:
        if not self.tools:
            raise OptionError("There are no tools to call; give at least one.")
        object.__setattr__(self, "tools", tuple(self.tools))
        check_length(self._grammar(), "The tools' schemas")

    def start(self, tokens: TokenTable) -> Matcher:
        """The state at the beginning of a reply."""
        grammar = require_llguidance().LLMatcher.grammar_from_lark(self._grammar())
        return Matcher(grammar, tokens, "The tools' schemas")

    def _grammar(self) -> str:
        """Lark: a rule for the call of each tool."""
        begin, end = self.notation.begin, self.notation.end
        before, after = (literal(f"{begin}\n"), literal(f"\n{end}")) if begin else ("", "")
        further = literal("\n") if begin else literal("; ")
        repeated = f" ({further} call){{0,{MOST_CALLS - 1}}}" if self.several else ""
        numbers = range(len(self.tools))
        rules = [
            f"start: call{repeated}",
            f"call: {before} ({' | '.join(f'call_{number}' for number in numbers)}) {after}",
        ]
        for number, (name, schema) in zip(numbers, self.tools, strict=True):
            opening = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{self.notation.arguments}": '
            rules += [
                f"call_{number}: {literal(opening)} arguments_{number} {literal('}')}",
                f"arguments_{number}: %json {_arguments(schema)}",
            ]
        return "\n".join(rules)


def _arguments(schema: Mapping[str, Any] | None) -> str:
    """The schema of an object of arguments, as JSON."""
    return json_text({"type": "object"} | dict(schema or {}) | {"x-guidance": WHITE_SPACE}, "A tool's schema")
