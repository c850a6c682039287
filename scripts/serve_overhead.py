"""What the HTTP server adds to the time of a token, and how long /health takes meanwhile.

Replies of the engine itself and of a server in the same process, streamed to a client in another, take turns.

    python scripts/serve_overhead.py [MODEL] [--tokens 128] [--rounds 15] [--clients 200]
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.checkpoint.find import DEFAULT_MODEL
from numba_atomflow.server.app import Server, ServerOptions
from numba_atomflow.server.limits import Limits
from numba_atomflow.server.run import HttpServer, bind

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    ready = threading.Event()
    limits = Limits()
    with (
        Engine.load(options.model, backend=options.backend, threads=options.threads) as engine,
        bind("127.0.0.1", 0) as bound,
    ):
        server = Server(engine, ServerOptions("model", most_waiting=1000, limits=limits))
        http_server = HttpServer(server, bound, limits, access_log=False, ready=ready.set)
        thread = threading.Thread(target=http_server.listen)
        thread.start()
        ready.wait()
        port = bound.getsockname()[1]
        try:
            measure_tokens(engine, server, port, options)
            measure_health(port, options.clients)
        finally:
            http_server.stop()
            thread.join()


def measure_tokens(engine: Engine, server: Server, port: int, options: argparse.Namespace) -> None:
    """Print the time per token of both and the ratio, and the same of CPU time: medians over the rounds.

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
    report("time", direct, served)
    report("CPU", direct_cpu, served_cpu)


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


def measure_health(port: int, clients: int) -> None:
    """Print how long /health takes while one reply is generated and the other clients wait."""
    asker = [sys.executable, "-c", CLIENTS, str(port), str(clients)]
    prober = [sys.executable, "-c", PROBE, str(port)]
    with subprocess.Popen(prober, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as probe:
        assert probe.stdout is not None
        probe.stdout.readline()
        subprocess.run(asker, check=True)
        times = sorted(map(float, probe.communicate()[0].split()))
    print(
        f"/health {statistics.median(times):.1f} ms median, {times[int(0.99 * len(times))]:.1f} ms p99, "
        f"{times[-1]:.1f} ms most, of {len(times)} with {clients} clients at once"
    )


if __name__ == "__main__":
    main()
