"""What the server measures of itself, for Prometheus."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily

from gpt_jax.sample.engine import Engine
from gpt_jax.sample.replicas import Replicas

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
SECONDS_A_TOKEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    """The metrics of one engine. Names are those of Prometheus' conventions: units in full, counters end in _total."""

    def __init__(self, engine: Engine | Replicas) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("gpt_jax_requests", "Requests, by path and status.", ["path", "status"], **own)
        self.rejected = Counter("gpt_jax_rejected_requests", "Requests refused since the queue was full.", **own)
        self.first = Histogram(
            "gpt_jax_time_to_first_token_seconds", "From a request to its first token.", buckets=SECONDS, **own
        )
        self.each = Histogram(
            "gpt_jax_time_per_token_seconds", "Of each token after the first.", buckets=SECONDS_A_TOKEN, **own
        )

        def gauge(name: str, what: str, value: Callable[[], float]) -> None:
            Gauge(f"gpt_jax_{name}", what, **own).set_function(value)

        gauge("waiting_requests", "Texts that wait for a slot.", lambda: engine.occupancy[0])
        gauge("busy_slots", "Slots in which a prompt is read, or a text written.", lambda: engine.occupancy[1])
        gauge("slots", "Slots.", lambda: engine.n_slots)
        self.registry.register(EngineCounts(engine))

    def text(self) -> bytes:
        """All of them, in Prometheus' format."""
        return generate_latest(self.registry)


class EngineCounts:
    """What the engine counts by itself. Tokens a second are the rate of gpt_jax_generated_tokens_total."""

    def __init__(self, engine: Engine | Replicas) -> None:
        self.engine = engine

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The counters as they stand."""
        counts = self.engine.counts
        for name, what, value in (
            ("texts", "Texts that were asked of the engine.", counts.requests),
            ("cancelled_texts", "Texts that ended early, by a stop string or a client that left.", counts.cancelled),
            ("prompt_tokens", "Tokens of prompts, read or found.", counts.prompt_tokens),
            ("cached_prompt_tokens", "Tokens of prompts that had been read before.", counts.reused_tokens),
            ("generated_tokens", "Tokens that were drawn.", counts.drawn_tokens),
        ):
            yield CounterMetricFamily(f"gpt_jax_{name}", what, value)
