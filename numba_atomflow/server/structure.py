"""The form of a reply, from fields of a request to a constraint: `response_format`, `grammar`, `tools`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from numba_atomflow.constraints import Constraint, Grammar, JsonObject, JsonSchema, ToolCalls
from numba_atomflow.errors import OptionError
from numba_atomflow.server.body import Body
from numba_atomflow.server.errors import ApiError, unsupported
from numba_atomflow.text.token_table import TokenTable
from numba_atomflow.text.tool_calls import ToolNotation

MOST_TOOLS = 128  # of a request, as on OpenAI's server

Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class TextFormat(Body):
    """`response_format`: any text."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """`response_format`: a JSON object."""

    type: Literal["json_object"]


class NamedSchema(Body):
    """A schema with a name; replies follow it strictly, whatever `strict` is."""

    name: Name
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Body):
    """`response_format`: JSON that a schema accepts."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class Function(Body):
    """What a tool is called by, and the schema of its arguments."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """The name in `tool_choice`."""

    name: Name


class NamedTool(Body):
    """`tool_choice`: this tool and no other."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool | None


@dataclass(frozen=True)
class ToolUse:
    """The tools that a reply may call.

    Attributes:
        tools: none of them: no calls.
        notation: the model's.
        choice: whether it may, must or which it must. several: more than one call in a reply.
    """

    tools: Sequence[Tool]
    notation: ToolNotation
    choice: ToolChoice
    several: bool

    @property
    def names(self) -> list[str]:
        """Of the tools, in order."""
        return [tool.function.name for tool in self.tools]

    def for_template(self) -> list[dict[str, Any]]:
        """The tools as chat templates expect them."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    def constraint(self) -> Constraint | None:
        """What the reply must be, if it must be calls."""
        if self.choice in (None, "auto"):
            return None
        name = self.choice.function.name if isinstance(self.choice, NamedTool) else None
        allowed = [tool.function for tool in self.tools if name in (None, tool.function.name)]
        return ToolCalls(self.notation, [(tool.name, tool.parameters) for tool in allowed], self.several)


def tool_use(
    tools: Sequence[Tool] | None, choice: ToolChoice, several: bool, notation: ToolNotation | None
) -> ToolUse | None:
    """The tools of a request, if its reply may call them.

    Args:
        notation: of the model; None: its chat template has no tools, or another notation.

    Raises:
        ApiError: the model cannot call tools, there are too many, two have one name, or the chosen one is missing.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice is for tools, and there are none; leave it out.", param="tool_choice")
        return None
    if choice == "none":
        return None
    if notation is None:
        raise unsupported(
            "tools",
            "need a chat template with tools in the notation of Hermes or Llama 3, which this "
            "model has not; leave them out",
        )
    names = [tool.function.name for tool in tools]
    if len(names) > MOST_TOOLS:
        raise ApiError(400, f"There are {len(names)} tools; give at most {MOST_TOOLS}.", param="tools")
    if len(set(names)) < len(names):
        raise ApiError(400, "Two tools have the same name; give each its own.", param="tools")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise ApiError(400, f"tool_choice names {choice.function.name!r}, which is no tool here.", param="tool_choice")
    return ToolUse(tools, notation, choice, several)


def constraint_of(
    response_format: ResponseFormat | None, grammar: str | None, tools: ToolUse | None, tokens: TokenTable
) -> Constraint | None:
    """The constraint on a reply, tried with this model.

    Raises:
        ApiError: there are two, or one is malformed.
    """
    wanted: dict[str, Callable[[], Constraint | None]] = {}
    if isinstance(response_format, JsonObjectFormat):
        wanted["response_format"] = JsonObject
    elif isinstance(response_format, JsonSchemaFormat):
        wanted["response_format"] = partial(JsonSchema, response_format.json_schema.json_schema or {"type": "object"})
    if grammar is not None:
        wanted["grammar"] = partial(Grammar, grammar)
    if tools is not None:
        wanted["tools"] = tools.constraint
    if len(wanted) > 1:
        first, second = list(wanted)[:2]
        raise ApiError(400, f"{first} and {second} exclude each other on this server; give one of them.", param=first)
    for param, make in wanted.items():
        try:
            constraint = make()
            if constraint is not None:
                constraint.start(tokens)
            return constraint
        except OptionError as error:
            raise ApiError(400, str(error), param=param) from error
    return None
