"""What the server counts and measures, for Prometheus.

A metric is told from where its fact is known, to whoever listens in this process; nobody does in tests and
benchmarks. Names end as Prometheus wants it (`_total`, `_seconds`, `_bytes`). Under Ray they come out of
each node's metrics port with `ray_` before them, and with Serve's own labels `application`, `deployment`,
`replica`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Labels = Mapping[str, str]
Sink = Callable[["Metric", float, Labels], None]

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800)
PACES = (0.1, 0.3, 1, 2, 3, 5, 8, 12, 20, 30, 50, 100)
ROWS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)

_sink: Sink | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """A name with what it means. Use the kinds below."""

    name: str
    description: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    kind: Literal["counter", "gauge", "histogram"] = "counter"

    def _tell(self, value: float, labels: Labels) -> None:
        assert set(labels) == set(self.labels), f"{self.name} has the labels {self.labels}"
        if _sink is not None:
            _sink(self, value, labels)


class Counter(Metric):
    """What only grows."""

    def add(self, amount: float = 1.0, **labels: str) -> None:
        self._tell(amount, labels)


class Gauge(Metric):
    """What is so now."""

    def __init__(self, name: str, description: str, labels: tuple[str, ...] = ()) -> None:
        super().__init__(name, description, labels, kind="gauge")

    def set(self, value: float, **labels: str) -> None:
        self._tell(value, labels)


class Histogram(Metric):
    """How values are spread."""

    def __init__(
        self, name: str, description: str, labels: tuple[str, ...] = (), buckets: tuple[float, ...] = SECONDS
    ) -> None:
        super().__init__(name, description, labels, buckets, kind="histogram")

    def observe(self, value: float, **labels: str) -> None:
        self._tell(value, labels)


def send_to(sink: Sink | None) -> None:
    """Have every fact of this process told to `sink`, on the thread that knows it; None: to nobody."""
    global _sink
    _sink = sink


# --- gateway ---

ACCEPTED = Counter("darkroom_requests_accepted_total", "Requests put into the queue", ("model", "priority"))
REFUSED = Counter(
    "darkroom_calls_refused_total", "HTTP calls answered with an error, by its type", ("reason", "status")
)

# --- dispatcher ---

WAITING = Gauge("darkroom_requests_waiting", "Requests in the queue", ("model", "priority"))
RUNNING = Gauge("darkroom_requests_running", "Requests that a worker has", ("model", "priority"))
OLDEST = Gauge(
    "darkroom_oldest_request_waiting_seconds",
    "Since the oldest in the queue was accepted",
    ("model",),
)
ENDED = Counter(
    "darkroom_requests_ended_total",
    "Requests with a result; error_type is empty for a success",
    ("model", "endpoint", "status", "error_type"),
)
WAIT = Histogram("darkroom_request_wait_seconds", "From acceptance to the last start", ("model", "priority"))
RUN = Histogram("darkroom_request_run_seconds", "From the last start to the result", ("model",))
STORE_UP = Gauge("darkroom_store_up", "1 while the queue's database answers the dispatcher, else 0")
WEBHOOKS = Counter("darkroom_webhook_tries_total", "Webhooks sent, by what came of it", ("outcome",))
DISK_FREE = Gauge("darkroom_files_free_bytes", "Free on the disk of the file store")

# --- worker ---

STAGE = Histogram("darkroom_stage_seconds", "A request's time by stage", ("model", "stage"))
PACE = Histogram("darkroom_steps_per_second", "Denoising steps a second of a request", ("model",), PACES)
COMPANY = Histogram(
    "darkroom_batch_rows", "Pictures that shared a forward, in the mean of a request", ("model",), ROWS
)
LOOKUPS = Counter(
    "darkroom_adapter_lookups_total",
    "Weights that requests named, by where the replica had them: device, ram, disk, none",
    ("model", "tier"),
)
HELD = Gauge("darkroom_adapter_bytes", "Weights that requests named, by where they lie", ("model", "tier"))
GPU_MEMORY = Gauge(
    "darkroom_gpu_memory_bytes",
    "Of torch in the replica: allocated, reserved, limit",
    ("model", "kind"),
)
