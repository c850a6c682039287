"""``numba-atomflow serve``: an HTTP server with OpenAI's protocol."""

import os
from pathlib import Path
from typing import Annotated

import typer

from numba_atomflow.checkpoint.find import DEFAULT_MODEL
from numba_atomflow.cli import options, output
from numba_atomflow.errors import OptionError
from numba_atomflow.files.text_input import read_text_file

API_KEY = "NUMBA_ATOMFLOW_API_KEY"  # environment variable

EXAMPLES = f"""\b
Examples:
  numba-atomflow serve
  numba-atomflow serve --model my-model.safetensors --port 8080 --max-seq-len 8192
  numba-atomflow serve --host 0.0.0.0 --api-key-file key.txt
  curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
    -d '{{"messages": [{{"role": "user", "content": "Name three rivers."}}], "stream": true}}'

\b
In Python: openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none"). The key may also be in the environment
variable {API_KEY}, which other users of the machine do not see. Ctrl-C ends the replies, then the server.
"""


def serve(
    *,
    model: options.Model = DEFAULT_MODEL,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Where to listen; 0.0.0.0: to every machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", help="0: a free one.", min=0, max=65535)] = 8000,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="By which clients know the model.  [default: its file's name]"),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", metavar="KEY", help="That clients must send.  [default: none]")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", metavar="FILE", help="A file with the key, as its only line.")
    ] = None,
    allow_special: Annotated[
        bool,
        typer.Option(
            "--allow-special",
            help="Special tokens that are spelled in messages become those tokens; otherwise they are text.",
        ),
    ] = False,
    max_queue: Annotated[
        int,
        typer.Option("--max-queue", metavar="N", help="Requests that may wait; further ones get status 429.", min=1),
    ] = 256,
    request_seconds: Annotated[
        float,
        typer.Option("--request-seconds", metavar="S", help="Longest time of a request, from its arrival.", min=0.1),
    ] = 600.0,
    max_body_mb: Annotated[
        float, typer.Option("--max-body-mb", metavar="MB", help="Largest body of a request.", min=0.001)
    ] = 4.0,
    prefix_cache_mb: Annotated[
        float,
        typer.Option(
            "--prefix-cache-mb",
            metavar="MB",
            help="Host memory for the KV caches of conversations other than the last; 0: none.",
            min=0,
        ),
    ] = 512.0,
    access_log: Annotated[bool, typer.Option("--access-log", help="A line on standard error per request.")] = False,
    max_seq_len: options.MaxSeqLen = None,
    draft: options.Draft = None,
    engine_options: options.EngineOptions,
    quiet: options.Quiet = False,
) -> None:
    """Serve one model to programs that speak OpenAI's protocol.

    There is one stream of tokens: requests are answered one after the other, in the order in which they arrive.
    """
    key = _api_key(api_key, api_key_file)
    try:
        from numba_atomflow.server.app import Server, ServerOptions
        from numba_atomflow.server.limits import Limits, is_loopback
        from numba_atomflow.server.run import HttpServer, bind, long_lived_objects, set_up_logs, url
    except ModuleNotFoundError as error:
        raise OptionError(
            f"The server needs the Python package {error.name}; install it by pip install 'numba-atomflow[serve]'."
        ) from error
    from numba_atomflow.text import template_process

    limits = Limits(body_bytes=int(max_body_mb * 1e6))
    with bind(host, port) as bound, template_process.prestarted():
        address = url(bound)
        loopback_only = is_loopback(bound.getsockname()[0])
        if key is None and not loopback_only and not quiet:
            output.warn(f"Every machine that reaches {address} can use the model; --api-key or {API_KEY} sets a key.")
        with engine_options.load(model, max_seq_len, draft) as engine:
            server_options = ServerOptions(
                model_name=name or engine.checkpoint.path.stem,
                api_key=key,
                allow_special=allow_special,
                loopback_only=loopback_only,
                most_waiting=max_queue,
                seconds_per_request=request_seconds,
                prefix_cache_bytes=int(prefix_cache_mb * 1e6),
                limits=limits,
            )

            def announce() -> None:
                if not quiet:
                    backend = engine.backend
                    where = f"{backend.name} ({backend.device}), context of {engine.max_seq_len} tokens"
                    output.say(f"{server_options.model_name} on {where}, at {address}/v1; Ctrl-C ends the server")

            with output.loading_bar() as progress:
                engine.warm_up(progress)
            set_up_logs(access_log)
            server = Server(engine, server_options)
            with long_lived_objects():
                HttpServer(server, bound, limits, access_log=access_log, ready=announce).listen()


def _api_key(given: str | None, file: Path | None) -> str | None:
    """The key of the command line, of a file, or of the environment.

    Raises:
        OptionError: there are two, or it is empty, or it is no line of printable characters.
    """
    if given is not None and file is not None:
        raise OptionError("There are two keys, --api-key and --api-key-file; give one of them.")
    key = given if file is None else read_text_file(file, "--api-key-file").strip()
    if key is None:
        key = os.environ.get(API_KEY)
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise OptionError("The API key must be one word of printable ASCII characters.")
    return key
