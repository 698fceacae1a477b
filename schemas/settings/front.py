"""The front: gateway, dispatcher, webhooks, and what is kept how long."""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from schemas.settings.base import FILES_URL, MAX_IMAGE_BYTES, Limits, ReachSettings, Settings

DAY_S = 86_400.0


class LeaseSettings(Settings):
    """How the dispatcher holds what it has claimed."""

    lease_s: float = Field(30, gt=0, description="a claim not renewed for so long is lost")
    heartbeat_s: float = Field(10, gt=0, description="how often claims are renewed")
    max_crashes: int = Field(3, ge=1, description="lost workers after which a request is given up")
    max_attempts: int = Field(
        10, ge=1, description="starts after which a request is given up, whatever they ended with"
    )
    backoff_s: float = Field(
        1, ge=0, description="wait after the first start that was lost; doubles with each"
    )

    @model_validator(mode="after")
    def _beats_within_the_lease(self) -> "LeaseSettings":
        if self.heartbeat_s * 2 > self.lease_s:
            raise ValueError(
                f"heartbeat_s ({self.heartbeat_s}) must be at most half of lease_s ({self.lease_s})"
            )
        return self


class WebhookSettings(ReachSettings):
    """How callers are told of finished requests: the `fal_webhook` of a submit.

    The default schedule is fal.ai's: 10 retries over 2 hours. That of Standard Webhooks, 75 hours, is
    5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400.
    """

    keys: str = Field(
        "file://~/.local/share/darkroom/webhook-keys",
        description="a folder for the private keys that sign; the first is drawn when it is needed",
    )
    key_overlap_s: float = Field(
        86_400, ge=0, description="how long a key is published before its first and after its last signature"
    )
    timeout_s: float = Field(15, gt=0, description="a whole try")
    retries_s: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (10, 30, 60, 120, 300, 600, 900, 1200, 1800, 2180), description="wait before each retry"
    )
    jitter: float = Field(0.1, ge=0, lt=1, description="a wait is longer or shorter by up to this share")
    lease_s: float = Field(60, gt=0, description="a try without an outcome for so long is taken for lost")
    per_host: int = Field(4, ge=1, description="tries at once to one host")
    concurrency: int = Field(128, ge=1, description="tries at once")

    @model_validator(mode="after")
    def _tries_within_the_lease(self) -> "WebhookSettings":
        if self.timeout_s * 2 > self.lease_s:
            raise ValueError(f"timeout_s ({self.timeout_s}) must be at most half of lease_s ({self.lease_s})")
        return self


class Retention(Settings):
    """How long things are kept that nobody deletes."""

    results_s: float = Field(
        30 * DAY_S,
        ge=DAY_S,
        description="a finished request: its input, output, log and webhook; fal.ai keeps them for 30 days",
    )
    files_s: int | None = Field(None, gt=0, description="a file whose caller did not say; null: for good")
    audit_s: float = Field(365 * DAY_S, ge=DAY_S, description="a line of the audit")


class OpenAIModel(Settings):
    """What a model's name means at the OpenAI-style paths."""

    generations: str | None = Field(None, description="the endpoint that makes pictures from text")
    edits: str | None = Field(None, description="the endpoint that remakes a picture")

    def endpoints(self) -> list[str]:
        return [each for each in (self.generations, self.edits) if each is not None]


def _public_url(text: str) -> str:
    url = urlsplit(text)
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
        raise ValueError(f"{text!r} is not an http or https URL that paths can be added to")
    return text.rstrip("/")


PublicUrl = Annotated[str, AfterValidator(_public_url)]


class FrontSettings(Settings):
    """The `args` of the front application: gateway, dispatcher, webhooks."""

    queue_url: str = Field(
        "sqlite:///~/.local/share/darkroom/queue.sqlite3",
        description="the durable queue: SQLite, on a local disk of one node, or PostgreSQL, as "
        "postgresql://USER@HOST/DATABASE; its password may come from PGPASSWORD or PGPASSFILE, and with "
        "postgresql:/// all the rest from PGHOST, PGUSER and their like",
    )
    files_url: str = Field(FILES_URL, description="where pictures are kept")
    public_url: PublicUrl | None = Field(
        None,
        description="how clients reach this server, such as https://pictures.example or, below a prefix of a "
        "proxy's, https://pictures.example/darkroom; when not set, taken from the request, without a prefix",
    )
    keys_env: str = Field(
        "DARKROOM_KEYS",
        description="name of the environment variable with ID:SECRET pairs, separated by commas "
        "or blanks, beside those of `darkroom keys`; without any key authentication is off",
    )
    bad_keys_per_minute: int = Field(
        60, ge=1, description="wrong keys of one address, beyond which a gateway replica answers 429 to them"
    )
    proxies: int = Field(
        0,
        ge=0,
        description="proxies of yours in front that add to X-Forwarded-For; 0: the header is anybody's word, "
        "and the address of a client is that of the other end of the connection",
    )
    max_body_bytes: int = Field(100 * 2**20, gt=0)
    max_image_bytes: int = Field(MAX_IMAGE_BYTES, gt=0, description="of a picture sent as a data URI")
    max_upload_bytes: int = Field(500 * 2**20, gt=0, description="of an uploaded file")
    max_runs: int | None = Field(
        None, ge=1, description="runs and streams that one key waits for at once in a gateway replica"
    )
    run_grace_s: float = Field(
        15, gt=0, description="after so long a run answers 200, and with spaces until its output is there"
    )
    linger_s: float = Field(
        5, gt=0, description="a run whose caller left is cancelled so much later, unless the call comes again"
    )
    openai_models: dict[str, OpenAIModel] = Field(
        default_factory=dict,
        description="names that /v1/images takes beside endpoint ids: {gpt-image-2: {generations: …}}",
    )
    min_free_bytes: int = Field(
        2**28, ge=0, description="of the disk of files_url; below it uploads and submits are refused with 507"
    )
    body_grace_s: float = Field(30, gt=0, description="how long the server waits for a body to come")
    body_bytes_per_s: float = Field(1024, gt=0, description="and a second more for so many bytes that came")
    realtime_idle_s: float | None = Field(
        3600, gt=0, description="a realtime connection without a message for so long is closed; null: never"
    )
    sweep_s: float = Field(
        600, gt=0, description="how often files whose time is over and uploads that were given up are removed"
    )
    keep: Retention = Retention()
    limits: Limits = Limits()
    lease: LeaseSettings = LeaseSettings()
    webhooks: WebhookSettings = WebhookSettings()
    gateway_replicas: int = Field(1, ge=1)
    node_labels: dict[str, str] = Field(
        default_factory=dict, description="Ray labels of the nodes that it may run on; none: any node"
    )
