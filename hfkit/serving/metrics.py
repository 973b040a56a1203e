"""What a server tells Prometheus. Labels are models and routes that are known, never what a request says."""

import time

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Monitor:
    """The numbers of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("hfkit_requests", "Requests.", ["route", "model", "status"], registry=registry)
        self.tokens = Counter("hfkit_tokens", "Tokens, read or written.", ["model", "kind"], registry=registry)
        self.feedback = Counter("hfkit_feedback", "Judgements of answers.", ["kind"], registry=registry)
        self.first = Histogram(
            "hfkit_time_to_first_token_seconds", "From a request to its first token.", ["model"],
            registry=registry, buckets=SECONDS,
        )  # fmt: skip
        self.between = Histogram(
            "hfkit_inter_token_seconds",
            "Of a step, which gives each answer a token.",
            registry=registry,
            buckets=SECONDS,
        )
        self.lost = Gauge("hfkit_log_lost_records", "Records that the log could not take.", registry=registry)
        self.waiting = Gauge("hfkit_requests_waiting", "Answers that wait for a slot.", registry=registry)
        self.slots = Gauge("hfkit_slots_in_use", "Answers that are being written.", registry=registry)
        self.memory = Gauge("hfkit_memory_bytes", "Resident memory of the process.", registry=registry)
        self.load = Gauge("hfkit_model_load_seconds", "Until all models had written a token.", registry=registry)
        self.started = Gauge("hfkit_start_time_seconds", "Seconds of the epoch.", registry=registry)
        self.started.set(time.time())
        self._process = psutil.Process()

    def text(self) -> bytes:
        self.memory.set(self._process.memory_info().rss)
        return generate_latest(self.registry)
