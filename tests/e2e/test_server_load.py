"""Many clients on one stream: order, bounds, clients that leave or do not read, and the end of the server.

Instead of the clock, the tests stop the generating thread at a token until something has happened.
"""

import asyncio
import gc
import http.client
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from child_processes import wait
from cli_runner import InProcess, assert_refused, command_line, environment

from numba_atomflow import Engine, Generation, SamplingParams
from numba_atomflow.context import Context
from numba_atomflow.errors import CheckpointError, OptionError
from numba_atomflow.model.step import Head

pytest.importorskip("starlette", reason="pip install 'numba-atomflow[serve]'")
pytest.importorskip("uvicorn", reason="pip install 'numba-atomflow[serve]'")

from live_server import Live, events, live_server

from numba_atomflow.server import app as app_module
from numba_atomflow.server import stream as stream_module
from numba_atomflow.server.app import Server, ServerOptions
from numba_atomflow.server.limits import Limits
from numba_atomflow.server.run import HttpServer, bind
from numba_atomflow.server.workers import LARGE_BYTES
from numba_atomflow.text import TextCodec

MOST = 480  # tokens; the context has 512


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(tiny_checkpoint, backend="cpu", threads=1) as engine:
        yield engine


@pytest.fixture
def live(engine: Engine) -> Iterator[Live]:
    with live_server(engine, most_waiting=4) as live:
        yield live


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": "Once", "temperature": 0, "max_tokens": 4, "ignore_eos": True} | fields


class Gate:
    """Stops the generating thread before each token from `token` on (counted over all replies), until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, token: int) -> None:
        self.tokens = 0
        self.prompts: list[str] = []
        self.reached, self._opened = threading.Event(), threading.Event()
        step, generate = Generation.step, Engine.generate

        def gated(generation: Generation) -> str:
            if self.tokens >= token:
                self.reached.set()
                self._opened.wait()
            self.tokens += 1
            return step(generation)

        def recorded(engine: Engine, prompt: Any, params: SamplingParams | None = None) -> Generation:
            self.prompts.append(engine.text.decode(prompt))
            return generate(engine, prompt, params)

        monkeypatch.setattr(Generation, "step", gated)
        monkeypatch.setattr(Engine, "generate", recorded)

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
def gate_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Gate]]:
    """Makes gates; they are open at the end, also when a test fails."""
    gates: list[Gate] = []

    def make(token: int) -> Gate:
        gates.append(Gate(monkeypatch, token))
        return gates[-1]

    yield make
    for gate in gates:
        gate.open()


@pytest.fixture
def gate(gate_at: Callable[[int], Gate]) -> Gate:
    return gate_at(0)


def in_thread(action: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def send(live: Live, body: dict[str, Any], receive_buffer: int | None = None) -> socket.socket:
    """A connection on which a request has been sent; the answer is not read."""
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", live.port))
    data = json.dumps(body).encode()
    lines = "POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close"
    connection.sendall("\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    data = b""
    with connection:
        while part := connection.recv(1 << 16):
            data += part
    return data


def queued(live: Live, count: int) -> bool:
    """Whether this many requests wait, with their prompts tokenized: only then their order is that of their replies."""
    tickets = list(live.stream._tickets)
    return len(tickets) == count and all(ticket.work is not None for ticket in tickets)


# --- order and bounds ------------------------------------------------------------------------------------------------


def test_requests_are_answered_in_the_order_of_their_arrival(live: Live, gate: Gate) -> None:
    clients = [send(live, completion(prompt="first"))]
    gate.reached.wait()
    for number in range(4):
        clients.append(send(live, completion(prompt=f"number {number}")))
        live.until(lambda: queued(live, len(clients) - 1))
    gate.open()
    assert all(b" 200 " in read_all(client) for client in clients)
    assert gate.prompts == ["first", *(f"number {number}" for number in range(4))]


def test_a_full_queue_refuses_and_says_when_to_come_again(live: Live, gate: Gate) -> None:
    clients = [send(live, completion())]
    gate.reached.wait()
    clients += [send(live, completion()) for _ in range(4)]
    live.until(lambda: live.stream.waiting == 4)
    answer = live.post("/v1/completions", completion())
    assert (answer.status, answer.body["error"]["code"]) == (429, "queue_full")
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    assert live.metric("atomflow_waiting_requests") == 4
    gate.open()
    assert all(b" 200 " in read_all(client) for client in clients)


def test_two_hundred_clients_at_once_all_get_their_reply(engine: Engine) -> None:
    expected = {
        prompt: engine.generate(prompt, SamplingParams(max_tokens=4, ignore_eos=True)).finish().text
        for prompt in ("Once", "Twice", "Never")
    }
    process = psutil.Process()

    async def client(live: Live, prompt: str) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", live.port)
        data = json.dumps(completion(prompt=prompt, stream=True)).encode()
        lines = "POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"
        writer.write("\r\n".join([*lines, f"Content-Length: {len(data)}", "Connection: close", "", ""]).encode() + data)
        answer = (await reader.read()).decode()
        writer.close()
        assert " 200 " in answer.partition("\r\n")[0]
        chunks = [line.removeprefix("data: ") for line in answer.splitlines() if line.startswith("data: {")]
        return "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)

    async def all_clients(live: Live) -> list[str]:
        return await asyncio.gather(*(client(live, prompt) for prompt in list(expected) * 67))

    with live_server(engine, most_waiting=201) as live:
        live.post("/v1/completions", completion())
        before = process.memory_info().rss
        replies = asyncio.run(all_clients(live))
        grown = process.memory_info().rss - before
        assert live.stream.waiting == 0
        assert live.metric('atomflow_http_responses_total{path="/v1/completions",status="200"}') == 202
    assert replies == list(expected.values()) * 67
    assert grown < 100e6


def test_health_and_metrics_are_answered_while_the_stream_is_busy(live: Live, gate: Gate) -> None:
    client = send(live, completion())
    gate.reached.wait()
    assert live.get("/health").status == 200
    assert live.metric("atomflow_running_requests") == 1
    gate.open()
    assert b" 200 " in read_all(client)


def test_health_does_not_wait_for_requests_that_arrive_with_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    loops: list[asyncio.AbstractEventLoop] = []
    begun: list[str] = []
    health, read_body = Server._health, app_module.read_body

    async def recorded_health(server: Server, request: Any) -> Any:
        loops.append(asyncio.get_running_loop())
        begun.append("health")
        return await health(server, request)

    async def recorded_body(request: Any, limits: Limits) -> bytes:
        begun.append("completion")
        return await read_body(request, limits)

    monkeypatch.setattr(Server, "_health", recorded_health)
    monkeypatch.setattr(app_module, "read_body", recorded_body)
    held, opened = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        opened.wait()

    with live_server(engine, most_waiting=201) as live:
        live.get("/health")
        loops[0].call_soon_threadsafe(hold)
        held.wait()
        begun.clear()
        clients = [send(live, completion(max_tokens=1)) for _ in range(100)]
        with live.connect() as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            opened.set()
            assert b" 200 " in connection.recv(4096)
        assert all(b" 200 " in read_all(client) for client in clients)
    assert begun.count("completion") == 100
    assert begun.index("health") < 10


def test_small_requests_are_tokenized_while_large_ones_are(
    live: Live, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, opened = threading.Semaphore(0), threading.Event()
    decode = TextCodec.decode

    def slow_decode(codec: TextCodec, tokens: list[int], skip_special: bool = True) -> str:
        if len(tokens) > 1:
            begun.release()
            opened.wait()
        return decode(codec, tokens, skip_special)

    monkeypatch.setattr(TextCodec, "decode", slow_decode)
    large = {"tokens": [65] * LARGE_BYTES}
    threads = [in_thread(lambda: live.post("/detokenize", large)) for _ in range(3)]
    try:
        begun.acquire()
        live.until(lambda: live.server._workers.waiting == 2)
        assert live.post("/detokenize", {"tokens": [65]}).status == 200
        assert live.post("/v1/completions", completion()).status == 200
    finally:
        opened.set()
    for thread in threads:
        thread.join()


# --- clients that leave or do not read -------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_stream_within_two_tokens(
    live: Live, gate_at: Callable[[int], Gate], stream: bool
) -> None:
    gate = gate_at(3)
    client = send(live, completion(max_tokens=MOST, stream=stream))
    gate.reached.wait()
    client.close()
    serving = live.stream._serving
    assert serving is not None
    live.until(lambda: serving.cancelled)
    gate.open()
    assert live.post("/v1/completions", completion()).status == 200
    assert gate.tokens <= 3 + 2 + 5  # of the other reply four, and its end
    assert live.metric("atomflow_cancelled_total") == 1
    assert live.metric('atomflow_generations_total{reason="interrupted"}') == 1
    if not stream:
        live.until(lambda: live.metric('atomflow_http_responses_total{path="/v1/completions",status="499"}') == 1)


def test_a_client_that_leaves_the_queue_gives_up_its_place(live: Live, gate: Gate) -> None:
    clients = [send(live, completion(prompt=prompt)) for prompt in ("first",)]
    gate.reached.wait()
    leaving = send(live, completion(prompt="leaving"))
    live.until(lambda: queued(live, 1))
    clients.append(send(live, completion(prompt="staying", stream=True)))
    live.until(lambda: live.stream.waiting == 2)
    leaving.close()
    live.until(lambda: live.stream.waiting == 1)
    gate.open()
    assert all(b" 200 " in read_all(client) for client in clients)
    assert gate.prompts == ["first", "staying"]
    assert live.metric("atomflow_cancelled_total") == 1


def test_a_client_that_leaves_is_noticed_in_the_middle_of_a_long_prompt(
    live: Live, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "PREFILL_TOKENS", 16)
    feed, fed, reached = Engine.feed, [], threading.Event()

    def slow_feed(engine: Engine, tokens: list[int], all_logits: bool = False) -> Any:
        fed.append(len(tokens))
        reached.set()
        serving = live.stream._serving
        assert serving is not None
        while not serving.cancelled:
            live.stream._changed.acquire()
            live.stream._changed.wait(0.05)
            live.stream._changed.release()
        return feed(engine, tokens, all_logits)

    monkeypatch.setattr(Engine, "feed", slow_feed)
    client = send(live, completion(prompt="x" * 300))
    reached.wait()
    client.close()
    live.until(lambda: not live.stream.is_busy)
    assert fed == [16]


def test_a_client_that_leaves_is_noticed_in_the_middle_of_a_scored_prompt(
    live: Live, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed, fed, reached, opened = Context.prefill, [], threading.Event(), threading.Event()

    def held_prefill(context: Context, tokens: list[int], head: Head) -> None:
        fed.append(len(tokens))
        reached.set()
        opened.wait()
        feed(context, tokens, head)

    monkeypatch.setattr(engine.backend, "prefill_chunk", 16)
    monkeypatch.setattr(Context, "prefill", held_prefill)
    client = send(live, completion(prompt="x" * 300, echo=True, logprobs=1, max_tokens=0))
    reached.wait()
    serving = live.stream._serving
    assert serving is not None
    client.close()
    try:
        live.until(lambda: serving.cancelled)
    finally:
        opened.set()
    live.until(lambda: not live.stream.is_busy)
    assert fed == [16]
    assert live.metric("atomflow_cancelled_total") == 1


def test_a_prompt_in_parts_gives_the_same_reply(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    body = completion(prompt="a prompt of several parts, more than three", max_tokens=8)
    with live_server(engine, prefix_cache_bytes=0) as live:
        live.post("/v1/completions", completion(prompt="b"))
        whole = live.post("/v1/completions", body).body["choices"]
        monkeypatch.setattr(stream_module, "PREFILL_TOKENS", 16)
        live.post("/v1/completions", completion(prompt="b"))
        answer = live.post("/v1/completions", body).body
    assert answer["choices"] == whole
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_slow_reader_stops_no_other_and_gets_everything(engine: Engine) -> None:
    body = completion(max_tokens=MOST, logprobs=20, stream=True)  # 400 kB of events
    with live_server(engine, send_buffer=4096, limits=Limits(stall_seconds=3600)) as live:
        slow = send(live, body, receive_buffer=4096)
        live.until(lambda: live.metric('atomflow_generations_total{reason="max_tokens"}') == 1)
        assert live.post("/v1/completions", completion()).status == 200
        with slow:
            response = http.client.HTTPResponse(slow)
            response.begin()
            text = response.read().decode()
        assert len(text) > 300_000
        assert sum(len(chunk["choices"][0]["logprobs"]["tokens"]) for chunk in events(text)[:-2]) == MOST


def test_a_client_that_never_reads_is_cut_off(engine: Engine) -> None:
    with live_server(engine, send_buffer=4096, limits=Limits(stall_seconds=0.2)) as live:
        client = send(live, completion(max_tokens=MOST, logprobs=20, stream=True), receive_buffer=4096)
        live.until(lambda: live.metric('atomflow_http_responses_total{path="/v1/completions",status="200"}') == 1)
        live.until(lambda: not [c for c in psutil.Process().net_connections("tcp") if _is_of(c, client)])
        assert b"[DONE]" not in read_all(client)


def _is_of(connection: Any, client: socket.socket) -> bool:
    """Whether this is the server's end of a client's connection, and open."""
    return (
        bool(connection.raddr)
        and connection.raddr.port == client.getsockname()[1]
        and connection.status == "ESTABLISHED"
    )


# --- time, failures, the end -----------------------------------------------------------------------------------------


def test_a_request_that_waits_too_long_is_refused(live: Live, gate: Gate) -> None:
    client = send(live, completion())
    gate.reached.wait()
    live.stream.seconds_per_request = 0.2
    answer = live.post("/v1/completions", completion())
    assert (answer.status, answer.body["error"]["code"]) == (503, "request_timeout")
    gate.open()
    assert b" 200 " in read_all(client)


def test_a_reply_that_lasts_too_long_ends_with_what_there_is(live: Live, gate_at: Callable[[int], Gate]) -> None:
    gate = gate_at(3)
    answers: list[Any] = []
    thread = in_thread(lambda: answers.append(live.post("/v1/completions", completion(max_tokens=MOST))))
    gate.reached.wait()
    serving = live.stream._serving
    assert serving is not None
    serving.deadline = 0.0
    gate.open()
    thread.join()
    assert answers[0].body["choices"][0]["finish_reason"] == "length"
    assert answers[0].body["usage"]["completion_tokens"] == 4


def test_a_bug_is_a_500_and_the_next_request_is_served(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "generate", lambda *_: 1 / 0)
        answer = live.post("/v1/completions", completion())
        assert (answer.status, answer.body["error"]["type"]) == (500, "server_error")
        *_, error, done = events(live.post("/v1/completions", completion(stream=True)).body)
        assert (error["error"]["type"], done) == ("server_error", "[DONE]")
    assert live.post("/v1/completions", completion()).status == 200


def test_an_engine_that_cannot_go_on_is_told_by_health(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise CheckpointError("The file was changed.")

    monkeypatch.setattr(Engine, "generate", fail)
    assert live.post("/v1/completions", completion()).status == 500
    assert live.get("/health").body == {"status": "failed", "reason": "The file was changed."}


# In the server's process: the reply stops at its third token until the server is told to end.
UNTIL_THE_END = """
import threading
from numba_atomflow import Generation
from numba_atomflow.server.stream import Stream
step, close, closed = Generation.step, Stream.close, threading.Event()
def held_step(generation):
    if len(generation.token_ids) == 3:
        closed.wait()
    return step(generation)
def closing(stream):
    close(stream)
    closed.set()
Generation.step, Stream.close = held_step, closing
"""


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_ends_the_streams_and_then_the_server(cli_home: Path, tiny_checkpoint: Path, number: int) -> None:
    options = "--model", tiny_checkpoint, "--port", 0, "--backend", "cpu", "--threads", 1
    command = command_line("serve", *options, before=UNTIL_THE_END)
    env = environment(cli_home) | {"NUMBA_ATOMFLOW_API_KEY": "secret"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=env, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        port = int(line.partition("http://127.0.0.1:")[2].partition("/")[0])
        body = json.dumps(completion(max_tokens=MOST, stream=True, echo=True)).encode()
        with socket.create_connection(("127.0.0.1", port)) as client:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            head += f"Authorization: Bearer secret\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            begin = b""
            while b"data: " not in begin:
                begin += client.recv(4096)
            os.kill(process.pid, number)
            answer = (begin + read_all(client)).decode()
        assert wait(process) == 0
        assert process.stderr.read() == ""
    assert "The server is shutting down." in answer
    assert "[DONE]" in answer


# --- the command line ------------------------------------------------------------------------------------------------


def test_what_cannot_be_listened_to_is_refused(cli: InProcess, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_refused(cli("serve", "--model", tiny_checkpoint, "--port", port), "--port", port)
    assert_refused(cli("serve", "--model", tiny_checkpoint, "--host", "no.such.host.invalid"), "--host")
    assert_refused(cli("serve", "--model", tmp_path / "none.safetensors", "--port", 0), "none.safetensors")


def test_a_port_that_was_taken_while_the_model_was_loaded_is_refused(engine: Engine) -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with bind("127.0.0.1", port) as second:  # which Linux allows while neither listens
            first.listen()
            server = HttpServer(Server(engine, ServerOptions("tiny")), second, Limits(), access_log=False, ready=list)
            with pytest.raises(OptionError, match=f"--port {port} of 127.0.0.1 cannot be listened to"):
                server.listen()


def test_garbage_collections_do_not_visit_what_the_server_began_with(
    cli: InProcess, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen: list[int] = []
    monkeypatch.setattr(HttpServer, "listen", lambda _server: frozen.append(gc.get_freeze_count()))
    gc.unfreeze()  # what pytest has frozen
    assert cli("serve", "--model", tiny_checkpoint, "--port", 0, "--backend", "cpu", "--threads", 1).code == 0
    assert frozen[0] > 10_000
    assert gc.get_freeze_count() == 0


def test_keys_that_cannot_be_are_refused(cli: InProcess, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("two words\n")
    assert_refused(cli("serve", "--api-key", ""), "API key")
    assert_refused(cli("serve", "--api-key-file", tmp_path / "key"), "API key")
    assert_refused(cli("serve", "--api-key-file", tmp_path / "none"), "--api-key-file")
    assert_refused(cli("serve", "--api-key", "a", "--api-key-file", tmp_path / "key"), "--api-key-file")
