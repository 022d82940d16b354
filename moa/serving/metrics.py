"""A server's counters in Prometheus' format. They hold no text of prompts or answers."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# Paths with a label of their own; others are counted as "other", because each label costs memory.
PATHS = ("/v1/chat/completions", "/v1/models", "/healthz", "/metrics", "/openapi.json", "/docs")
# Upper bounds of the histograms' buckets.
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self._requests = Counter("moa_requests", "Requests by path and HTTP status.", ["path", "status"],
                                 registry=registry)
        self._seconds = Histogram("moa_request_seconds", "Time to the last byte of a chat request.", buckets=SECONDS,
                                  registry=registry)
        self._tokens = Counter("moa_tokens", "Tokens read (prompt) and written (completion).", ["kind"],
                               registry=registry)
        self._routes = Counter("moa_routes", "Answers by who gave them.", ["domain", "chosen"], registry=registry)
        self._abstentions = Counter("moa_abstentions", "Answers of the base because the router abstained.",
                                    registry=registry)
        self.rows = Histogram("moa_batch_rows", "Rows decoded together.", buckets=ROWS, registry=registry)

    def watch(self, *, waiting: Callable[[], float], running: Callable[[], float], release: Callable[[], float],
              failures: Callable[[], float]) -> None:
        """Register gauges whose values are read at each scrape."""
        for name, description, value in (
                ("moa_waiting", "Requests that wait for a batch.", waiting),
                ("moa_running", "Requests being decoded.", running),
                ("moa_release", "Version of the release that serves.", release),
                ("moa_swap_failures", "Champions that could not be loaded.", failures)):
            Gauge(name, description, registry=self.registry).set_function(value)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count one finished request."""
        self._requests.labels(path if path in PATHS else "other", str(status)).inc()
        if path == PATHS[0]:
            self._seconds.observe(seconds)

    def answer(self, answer: Any) -> None:
        """Count one answer's tokens and route; `answer` has the fields of `moa.mixture.mixture.Answer`."""
        self._tokens.labels("prompt").inc(answer.prompt_tokens)
        self._tokens.labels("completion").inc(answer.tokens)
        by = "base" if answer.abstained else answer.domain
        self._routes.labels(by, "caller" if answer.similarity is None else "router").inc()
        if answer.abstained:
            self._abstentions.inc()

    def text(self) -> bytes:
        """All counters in Prometheus' text format."""
        return generate_latest(self.registry)
