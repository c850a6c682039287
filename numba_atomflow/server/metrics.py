"""What /metrics shows, in Prometheus' text format."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from numba_atomflow.server.stream import Ended

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_TOKEN_SECONDS = (0.0003, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3)


class Metrics:
    """The counters of one server; also the observer of its stream."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def name(text: str) -> str:
            return f"atomflow_{text}"

        self._responses = Counter(
            name("http_responses"), "Responses by path and status.", ["path", "status"], registry=registry
        )
        self._prompt = Counter(name("prompt_tokens"), "Tokens of prompts.", registry=registry)
        self._cached = Counter(
            name("cached_tokens"), "Tokens of prompts that were in the KV cache already.", registry=registry
        )
        self._tokens = Counter(name("generated_tokens"), "Generated tokens.", registry=registry)
        self._finished = Counter(name("generations"), "Generations by finish reason.", ["reason"], registry=registry)
        self._left = Counter(name("cancelled"), "Requests whose client left before the end.", registry=registry)
        self._waited = Histogram(
            name("queue_seconds"), "From arrival to the begin of work.", buckets=_SECONDS, registry=registry
        )
        self._ttft = Histogram(
            name("ttft_seconds"), "From arrival to the first token.", buckets=_SECONDS, registry=registry
        )
        self._tpot = Histogram(
            name("tpot_seconds"), "Time per token after the first.", buckets=_TOKEN_SECONDS, registry=registry
        )

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Show a value that is read when somebody asks."""
        Gauge(f"atomflow_{name}", text, registry=self._registry).set_function(value)

    def responded(self, path: str, status: int) -> None:
        """Count a response; `path` is one of the server's own, or "other"."""
        self._responses.labels(path, str(status)).inc()

    def started(self, waited: float) -> None:
        self._waited.observe(waited)

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def generated(self, ended: Ended, decode_seconds: float) -> None:
        self._prompt.inc(ended.prompt_tokens)
        self._cached.inc(ended.cached_tokens)
        self._tokens.inc(ended.tokens)
        self._finished.labels(ended.finish_reason).inc()
        if ended.tokens > 1:
            self._tpot.observe(decode_seconds / (ended.tokens - 1))

    def cancelled(self) -> None:
        self._left.inc()

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)
