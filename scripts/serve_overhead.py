"""What the HTTP server adds to the time of a token, and how long /health takes meanwhile.

Replies of the engine itself and of a server in the same process, streamed to a client in another, take turns.

    python scripts/serve_overhead.py                                          # the demo model
    python scripts/serve_overhead.py my-model.safetensors --tokens 96 --rounds 8 --threads 1 --json
    python scripts/serve_overhead.py --geometry llama-3.2-1b --backend cuda   # random weights: no model is needed
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from numba_atomflow import AtomFlowError, Engine, SamplingParams
from numba_atomflow.checkpoint.find import DEFAULT_MODEL
from numba_atomflow.host.machine import machine_record
from numba_atomflow.model.presets import PRESETS
from numba_atomflow.server.app import Server, ServerOptions
from numba_atomflow.server.limits import Limits
from numba_atomflow.server.run import HttpServer, bind, long_lived_objects
from numba_atomflow.text.codec import TextAssets
from numba_atomflow.utils.json_text import json_text

PROMPT = "Once upon a time"
CLIENT = """
import http.client, sys
for line in sys.stdin:
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
    connection.request("POST", "/v1/completions", line.encode(), {"Content-Type": "application/json"})
    response = connection.getresponse()
    while response.read1():
        pass
    connection.close()
    print("done", flush=True)
"""
CLIENTS = """
import asyncio, json, sys
port, count = map(int, sys.argv[1:])
body = json.dumps({"prompt": "Once upon a time", "max_tokens": 32, "ignore_eos": True, "stream": True})
head = "POST /v1/completions HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Type: application/json\\r\\n"
request = f"{head}Connection: close\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n{body}".encode()

async def ask():
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    assert b"[DONE]" in await reader.read()
    writer.close()

async def ask_all():
    await asyncio.gather(*(ask() for _ in range(count)))

asyncio.run(ask_all())
"""
PROBE = """
import http.client, select, sys, time
times = []
while not select.select([sys.stdin], [], [], 0.01)[0]:  # until it is closed
    begin = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()
    times.append(1e3 * (time.perf_counter() - begin))
    if len(times) == 1:
        print(flush=True)
print(*times)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print lines or JSON; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    which.add_argument("--geometry", choices=PRESETS, help="of a model with random weights, in place of MODEL")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--backend", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="print a record")
    options = parser.parse_args(arguments)
    if options.tokens < 2 or options.rounds < 2 or options.clients < 1:
        parser.error("--tokens and --rounds are 2 or more, --clients 1 or more")
    try:
        record = measure(options)
    except AtomFlowError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        print(json_text({"machine": machine_record()} | record))
        return 0
    report("time", record["seconds"]["engine"], record["seconds"]["server"])
    report("CPU", record["cpu_seconds"]["engine"], record["cpu_seconds"]["server"])
    times = record["health_ms"]
    print(
        f"/health {statistics.median(times):.1f} ms median, {times[int(0.99 * len(times))]:.1f} ms p99, "
        f"{times[-1]:.1f} ms most, of {len(times)} with {options.clients} clients at once"
    )
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds per token of each round, and milliseconds of /health in ascending order."""
    ready = threading.Event()
    limits = Limits()
    with (
        open_engine(options) as engine,
        bind("127.0.0.1", 0) as bound,
        long_lived_objects(),
    ):
        server = Server(engine, ServerOptions("model", most_waiting=1000, limits=limits))
        http_server = HttpServer(server, bound, limits, access_log=False, ready=ready.set)
        thread = threading.Thread(target=http_server.listen)
        thread.start()
        ready.wait()
        port = bound.getsockname()[1]
        try:
            tokens = measure_tokens(engine, server, port, options)
            return tokens | {"health_ms": measure_health(port, options.clients)}
        finally:
            http_server.stop()
            thread.join()


def open_engine(options: argparse.Namespace) -> Engine:
    """The model, or one with random weights and a tokenizer whose tokens are bytes and made-up words."""
    if options.geometry is None:
        return Engine.load(options.model, backend=options.backend, threads=options.threads)
    engine = Engine.random(PRESETS[options.geometry], options.backend, threads=options.threads)
    engine.checkpoint.text = TextAssets(tokenizer_json=word_tokenizer(engine.geometry.vocabulary))
    return engine


def word_tokenizer(vocabulary: int) -> bytes:
    """A tokenizer.json with so many tokens: the 256 bytes, and words that a reply may have but no prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    spellings = [*pre_tokenizers.ByteLevel.alphabet(), *(f"Ġword{number}" for number in range(vocabulary - 256))]
    tokenizer = Tokenizer(models.BPE({spelling: number for number, spelling in enumerate(spellings)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return str(tokenizer.to_str()).encode()


def measure_tokens(engine: Engine, server: Server, port: int, options: argparse.Namespace) -> dict[str, Any]:
    """The time per token of both in each round, and the same of CPU time, in seconds.

    CPU time is that of this process: of the engine, and of the server's event loop, which runs beside it. On a busy
    machine it is the better measure, with `--threads 1`, since several threads use some for waiting.
    """
    params = SamplingParams(max_tokens=options.tokens, ignore_eos=True)
    body = {"prompt": PROMPT, "max_tokens": options.tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    served: list[float] = []
    server.metrics.generated = (  # type: ignore[method-assign]
        lambda ended, seconds: served.append(seconds / (ended.tokens - 1))
    )
    direct: list[float] = []
    direct_cpu: list[float] = []
    served_cpu: list[float] = []
    command = [sys.executable, "-c", CLIENT, str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        for _ in range(options.rounds):
            begin = time.process_time()
            direct.append(engine.generate(PROMPT, params).finish().stats.tpot)
            engine.reset()
            direct_cpu.append((time.process_time() - begin) / options.tokens)
            begin = time.process_time()
            client.stdin.write(json.dumps(body) + "\n")
            client.stdin.flush()
            client.stdout.readline()
            served_cpu.append((time.process_time() - begin) / options.tokens)
            engine.reset()
        client.stdin.close()
    return {
        "seconds": {"engine": direct, "server": list(served)},  # a copy: later replies are counted as well
        "cpu_seconds": {"engine": direct_cpu, "server": served_cpu},
    }


def report(what: str, direct: list[float], served: list[float]) -> None:
    """Print what a token takes, in seconds, without and with the server."""
    ratios = [one / other for one, other in zip(served, direct, strict=True)]
    added = [1e6 * (one - other) for one, other in zip(served, direct, strict=True)]
    print(
        f"{what:5} engine {1e3 * statistics.median(direct):.3f} ms, server {1e3 * statistics.median(served):.3f} ms; "
        f"ratio {statistics.median(ratios):.3f} ({quartiles(ratios)}), "
        f"added {statistics.median(added):.0f} us ({quartiles(added)})"
    )


def quartiles(values: list[float]) -> str:
    low, _, high = statistics.quantiles(values, n=4)
    return f"{low:.3f} to {high:.3f}"


def measure_health(port: int, clients: int) -> list[float]:
    """Milliseconds of /health, ascending, while one reply is generated and the other clients wait."""
    asker = [sys.executable, "-c", CLIENTS, str(port), str(clients)]
    prober = [sys.executable, "-c", PROBE, str(port)]
    with subprocess.Popen(prober, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as probe:
        assert probe.stdout is not None
        probe.stdout.readline()
        subprocess.run(asker, check=True)
        return sorted(map(float, probe.communicate()[0].split()))


if __name__ == "__main__":
    sys.exit(main())
