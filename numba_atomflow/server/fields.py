"""What requests may contain.

As on OpenAI's server an unknown field is refused, and null means a field's default. Fields of OpenAI's API that would
change the reply, and that this server lacks, are refused unless their value changes nothing; hints are accepted.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from numba_atomflow.sampling import MOST_LOGPROBS, SamplingParams
from numba_atomflow.server.body import Body
from numba_atomflow.server.errors import unsupported
from numba_atomflow.server.structure import NamedTool, ResponseFormat, Tool

MOST_PROMPTS = 256  # of one request to /v1/completions
MOST_STOPS = 64  # texts in `stop`: each is looked for after every token
LONGEST_STOP = 1024  # characters: so many may be held back, and are compared with each text after every token

# Values that change nothing, by the name of a field that is refused with any other value.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "web_search_options": (),
}


class StreamOptions(Body):
    """Of a streamed reply. `include_obfuscation` is a hint: there is no padding here."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampling(Body):
    """Fields that /v1/chat/completions and /v1/completions share."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Ours, by the names that other servers have for them.
    top_k: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    ignore_eos: bool | None = None
    grammar: str | None = None
    # Refused unless neutral.
    n: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    logit_bias: Any = None
    # Hints that change nothing here.
    user: Any = None

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Self:
        for name, neutral in _NEUTRAL.items():
            value = getattr(self, name, None)
            if value is None or any(type(value) is type(other) and value == other for other in neutral):
                continue
            only = f"; leave it out or give {neutral[0]!r}" if neutral else "; leave it out"
            raise unsupported(name, f"is not supported by this server{only}")
        if isinstance(self.stop, list) and len(self.stop) > MOST_STOPS:
            raise unsupported("stop", f"holds {len(self.stop)} texts; give at most {MOST_STOPS}")
        longest = max(map(len, [self.stop] if isinstance(self.stop, str) else self.stop or ()), default=0)
        if longest > LONGEST_STOP:
            raise unsupported("stop", f"holds a text of {longest} characters; give at most {LONGEST_STOP}")
        if self.stream_options is not None and not self.stream:
            raise unsupported("stream_options", "is for streams; set stream to true or leave it out")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def params(self, max_tokens: int | None, **more: Any) -> SamplingParams:
        """The options for the engine; the defaults are OpenAI's.

        Raises:
            OptionError: a value is out of range.
        """
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            seed=None if self.seed is None else self.seed % (1 << 64),
            max_tokens=max_tokens,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop or (),
            ignore_eos=bool(self.ignore_eos),
            **more,
        )


class ChatRequest(Sampling):
    """POST /v1/chat/completions. Messages are checked where the chat template is rendered."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: Any = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    web_search_options: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    verbosity: Any = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise unsupported("top_logprobs", "needs logprobs to be true")
        return self

    @property
    def most_tokens(self) -> int | None:
        """The limit on the reply; the newer name of the field goes first."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(Sampling):
    """POST /v1/completions. `prompt` is a text or token ids, or a list of either."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Any = None
    suffix: Any = None

    @property
    def most_tokens(self) -> int:
        """The limit on the reply, by default OpenAI's 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        """Every prompt.

        Raises:
            ApiError: there are none, or too many.
        """
        prompts: list[Any]
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            prompts = [self.prompt]
        else:
            prompts = list(self.prompt)
        if not 1 <= len(prompts) <= MOST_PROMPTS:
            raise unsupported("prompt", f"holds {len(prompts)} prompts; give 1 to {MOST_PROMPTS}")
        return prompts


class TokenizeRequest(Body):
    """POST /tokenize: of a text, or of a conversation as the model gets it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise unsupported("prompt", "or messages must be there, and not both")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]
