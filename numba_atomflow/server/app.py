"""The routes."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from numba_atomflow.constraints import AfterReasoning
from numba_atomflow.engine import Engine
from numba_atomflow.errors import AtomFlowError
from numba_atomflow.server.errors import ApiError, of_engine
from numba_atomflow.server.fields import ChatRequest, CompletionRequest, DetokenizeRequest, Sampling, TokenizeRequest
from numba_atomflow.server.limits import ApiKey, HeaderSize, Limits, LoopbackHost, read_body
from numba_atomflow.server.logprobs import CompletionLogprobs, TokenNames
from numba_atomflow.server.metrics import CONTENT_TYPE, Metrics
from numba_atomflow.server.page import page_routes
from numba_atomflow.server.prefixes import Prefixes
from numba_atomflow.server.replies import ChatShape, CompletionShape, Prompt, Shape
from numba_atomflow.server.respond import CLIENT_CLOSED_REQUEST, StreamedReply, whole_reply
from numba_atomflow.server.stream import Stream, Work
from numba_atomflow.server.structure import constraint_of, tool_use
from numba_atomflow.server.workers import Workers
from numba_atomflow.text.reasoning import OPENING, ReasoningSplitter, prompt_opening
from numba_atomflow.text.tool_calls import ToolCallParser, tool_notation


@dataclass(frozen=True)
class ServerOptions:
    """How a server behaves; where it listens is the business of `run`.

    Attributes:
        model_name: by which clients know the model.
        api_key: that they must send; None: none.
        allow_special: a special token that is spelled in a message becomes that token, as in transformers; otherwise
            it is text.
        loopback_only: refuse requests that call the server by another name than localhost.
        most_waiting: requests in the queue. seconds_per_request: from its arrival to its end.
        prefix_cache_bytes: of host memory for the KV caches of other conversations than the last.
        limits: on what a client sends.
    """

    model_name: str
    api_key: str | None = None
    allow_special: bool = False
    loopback_only: bool = True
    most_waiting: int = 256
    seconds_per_request: float = 600.0
    prefix_cache_bytes: int = 512 << 20
    limits: Limits = field(default_factory=Limits)


class Server:
    """The application for one engine.

    Attributes:
        app: to be run by an ASGI server.
        stream: to be started before, and closed after.
    """

    def __init__(self, engine: Engine, options: ServerOptions) -> None:
        self._engine, self.options = engine, options
        self._text = engine.text
        self._names = TokenNames(engine.text.token_bytes)
        template = engine.text.assets.chat_template or ""
        self._notation, self._reasons = tool_notation(template), OPENING in template
        self._workers = Workers()
        self._most_characters = engine.max_seq_len * engine.text.longest_token  # of a prompt that may fit
        self.metrics = Metrics()
        prefixes = Prefixes(engine, options.prefix_cache_bytes)
        self.stream = Stream(engine, prefixes, self.metrics, options.most_waiting, options.seconds_per_request)
        self.metrics.gauge("waiting_requests", "Requests in the queue.", lambda: self.stream.waiting)
        self.metrics.gauge("running_requests", "Requests being served, 0 or 1.", lambda: self.stream.is_busy)
        self.metrics.gauge("waiting_to_tokenize", "Requests that wait for a thread.", lambda: self._workers.waiting)
        self.metrics.gauge("prefix_cache_bytes", "KV caches of other conversations.", lambda: prefixes.nbytes)
        self.metrics.gauge("prefix_cache_entries", "How many they are.", lambda: len(prefixes))
        routes = [
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._model, methods=["GET"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            *page_routes(),
        ]
        paths = frozenset(route.path for route in routes)
        middleware = [Middleware(_CountResponses, metrics=self.metrics, paths=paths)]
        middleware.append(Middleware(HeaderSize, limits=options.limits))
        if options.loopback_only:
            middleware.append(Middleware(LoopbackHost))
        if options.api_key is not None:
            middleware.append(Middleware(ApiKey, key=options.api_key))
        self.app = Starlette(routes=routes, middleware=middleware, exception_handlers=_HANDLERS)

    # --- what runs -----------------------------------------------------------------------------------------------

    async def _health(self, _: Request) -> Response:
        if self.stream.failure is not None:
            return JSONResponse({"status": "failed", "reason": self.stream.failure}, 503)
        return JSONResponse({"status": "ok"})

    async def _metrics(self, _: Request) -> Response:
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_record()]})

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model_record())

    def _model_record(self) -> dict[str, Any]:
        return {
            "id": self.options.model_name,
            "object": "model",
            "created": 0,
            "owned_by": "numba-atomflow",
            "max_model_len": self._engine.max_seq_len,
        }

    def _check_model(self, name: str | None) -> None:
        """A name in a request is compared, and never looked for."""
        if name not in (None, self.options.model_name):
            message = f"The model {name!r} does not exist here; this server has {self.options.model_name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    # --- generating ----------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        body = await read_body(request, self.options.limits)
        fields = ChatRequest.parse(body)
        self._check_model(fields.model)

        def prepare() -> tuple[list[Work], Shape]:
            several = fields.parallel_tool_calls is not False
            tools = tool_use(fields.tools, fields.tool_choice, several, self._notation)
            constraint = constraint_of(fields.response_format, fields.grammar, tools, self._engine.token_table)
            variables = dict(fields.chat_template_kwargs or {}) | ({"tools": tools.for_template()} if tools else {})
            prompt = self._conversation(fields.messages, variables)
            opened = self._reasons and bool(prompt_opening(self._text.decode(prompt[-16:], skip_special=False)))
            if self._reasons and constraint is not None:
                constraint = AfterReasoning(constraint, opened)
            logprobs = fields.top_logprobs or 0 if fields.logprobs else None
            params = fields.params(fields.most_tokens, logprobs=logprobs, constraint=constraint)
            names = self._names if fields.logprobs else None
            calls = ToolCallParser(tools.notation, tools.names) if tools else None
            reasoning = ReasoningSplitter(opened) if self._reasons else None
            shape = ChatShape(
                self.options.model_name, fields.include_usage, names=names, calls=calls, reasoning=reasoning
            )
            return [Work(self._fitting(prompt, "messages"), params, is_chat=True)], shape

        return await self._reply(request, fields, prepare, len(body))

    async def _completions(self, request: Request) -> Response:
        body = await read_body(request, self.options.limits)
        fields = CompletionRequest.parse(body)
        self._check_model(fields.model)

        def prepare() -> tuple[list[Work], Shape]:
            prompts = [self._prompt(fields, prompt) for prompt in fields.prompts]
            scored = fields.logprobs if fields.echo else None
            only_prompt = bool(fields.echo) and fields.most_tokens == 0
            most = 1 if only_prompt else fields.most_tokens
            constraint = constraint_of(None, fields.grammar, None, self._engine.token_table)
            params = fields.params(most, logprobs=fields.logprobs, prompt_logprobs=scored, constraint=constraint)
            work = [Work(prompt.token_ids, params, is_chat=False, only_prompt=only_prompt) for prompt in prompts]
            return work, CompletionShape(self.options.model_name, fields.include_usage, prompts=prompts)

        return await self._reply(request, fields, prepare, len(body))

    async def _reply(
        self, request: Request, fields: Sampling, prepare: Callable[[], tuple[list[Work], Shape]], body_bytes: int
    ) -> Response:
        """Queue up, tokenize while waiting, and answer."""
        ticket = self.stream.take_ticket()
        try:
            work, shape = await self._workers.run(prepare, body_bytes)
            self.stream.submit(ticket, work)
        except BaseException:
            self.stream.release(ticket)
            raise
        if fields.stream:
            return StreamedReply(self.stream, ticket, shape, fields.include_usage)
        return await whole_reply(request, self.stream, ticket, shape)

    def _conversation(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None) -> list[int]:
        allow_special = self.options.allow_special
        return self._text.encode_chat(messages, variables, allow_special=allow_special, check=self._check_messages)

    def _check_messages(self, rendered: str) -> None:
        self._check_length(rendered, "messages")

    def _check_length(self, text: str, param: str) -> None:
        """Refuse a text that cannot fit into the context, before it is tokenized: that may take seconds."""
        if len(text) > self._most_characters:
            raise ApiError(
                400,
                f"The request has {len(text)} characters, but the context of this server, {self._engine.max_seq_len} "
                f"tokens, holds at most {self._most_characters}; shorten the {param}.",
                param=param,
                code="context_length_exceeded",
            )

    def _encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of the prompt of a request."""
        self._check_length(text, "prompt")
        return self._text.encode(text, add_special)

    def _prompt(self, fields: CompletionRequest, prompt: str | list[int]) -> Prompt:
        is_text = isinstance(prompt, str)
        token_ids = self._fitting(self._encode(prompt) if isinstance(prompt, str) else prompt, "prompt")
        echoed = prompt if isinstance(prompt, str) else self._text.decode(prompt, skip_special=False)
        logprobs = None if fields.logprobs is None else CompletionLogprobs(self._names, echoed_special=not is_text)
        return Prompt(token_ids, echoed if fields.echo else "", logprobs)

    def _fitting(self, prompt: list[int], param: str) -> list[int]:
        """The prompt, if the engine can take it."""
        most = self._engine.max_seq_len
        if not prompt:
            raise ApiError(400, f"The {param} has no tokens; give some text.", param=param)
        if len(prompt) > most:
            message = (
                f"The request has {len(prompt)} tokens, but the context of this server holds {most}; "
                f"shorten the {param}."
            )
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        self._check_tokens(prompt, param)
        return prompt

    def _check_tokens(self, tokens: Sequence[int], param: str) -> None:
        """Refuse ids that no token of the model has."""
        vocabulary = self._engine.geometry.vocabulary
        if not 0 <= min(tokens, default=0) <= max(tokens, default=0) < vocabulary:
            raise ApiError(400, f"{param} holds a token outside the vocabulary of {vocabulary}.", param=param)

    # --- tokens --------------------------------------------------------------------------------------------------

    async def _tokenize(self, request: Request) -> Response:
        body = await read_body(request, self.options.limits)
        fields = TokenizeRequest.parse(body)
        self._check_model(fields.model)

        def encode() -> list[int]:
            if fields.messages is not None:
                return self._conversation(fields.messages, fields.chat_template_kwargs)
            return self._encode(fields.prompt or "", fields.add_special_tokens is not False)

        tokens = await self._workers.run(encode, len(body))
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": self._engine.max_seq_len})

    async def _detokenize(self, request: Request) -> Response:
        body = await read_body(request, self.options.limits)
        fields = DetokenizeRequest.parse(body)
        self._check_model(fields.model)
        self._check_tokens(fields.tokens, "tokens")
        text = await self._workers.run(lambda: self._text.decode(fields.tokens, skip_special=False), len(body))
        return JSONResponse({"prompt": text})


class _CountResponses:
    """ASGI middleware: every response is counted, by one of the server's own paths."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._metrics.responded(path, message["status"])
            await send(message)

        await self._app(scope, receive, counting if scope["type"] == "http" else send)


async def _refuse(_: Request, error: Exception) -> Response:
    if isinstance(error, AtomFlowError):
        error = of_engine(error)
    if not isinstance(error, ApiError):
        raise error
    return JSONResponse(error.body(), error.status, error.headers)


async def _refuse_path(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    what = "Unknown request URL" if status == 404 else "Not allowed"
    refused = ApiError(status, f"{what}: {request.method} {request.scope['path']}.", code="unknown_url")
    headers = error.headers if isinstance(error, HTTPException) else None
    return JSONResponse(refused.body(), status, headers)


async def _apologize(_: Request, __: Exception) -> Response:
    """A bug; its traceback goes to the log."""
    return JSONResponse(ApiError(500, "The request failed by a bug of this server; see its log.").body(), 500)


async def _forget(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


_Handler = Callable[[Request, Exception], Awaitable[Response]]
_HANDLERS: Mapping[Any, _Handler] = {
    ApiError: _refuse,
    AtomFlowError: _refuse,
    HTTPException: _refuse_path,
    ClientDisconnect: _forget,
    Exception: _apologize,
}
