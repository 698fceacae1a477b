"""Every knob, typed and frozen: the form of the `args` and `user_config` in serve_config.yaml.

An unknown key or a bad value stops the start and is named. Units are in the names.
"""

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MAX_IMAGE_BYTES = 50 * 2**20  # what fal.ai's own toolkit downloads at most
DAY_S = 86_400.0


# The methods that fal names, in the files of https://huggingface.co/Xiaojiu-Z/EasyControl
_METHODS = ("canny", "depth", "hedsketch", "inpainting", "pose", "seg", "subject")
EASYCONTROLS = {
    **{name: f"Xiaojiu-Z/EasyControl/models/{name}.safetensors" for name in _METHODS},
    "ghibli": "Xiaojiu-Z/EasyControl/models/Ghibli.safetensors",
}


SafetyPolicy = Literal["asked", "always"]


class Settings(BaseModel):
    """The base of all settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Limits(Settings):
    """What one request may ask for beyond what its schema says."""

    max_pixels: int = Field(2048 * 2048, gt=0, description="width × height of one picture")
    max_megapixel_steps: float = Field(
        2500, gt=0, description="width × height in millions, times images, times steps, of one request"
    )


def _public_url(text: str) -> str:
    url = urlsplit(text)
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
        raise ValueError(f"{text!r} is not an http or https URL that paths can be added to")
    return text.rstrip("/")


PublicUrl = Annotated[str, AfterValidator(_public_url)]


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


class ReachSettings(Settings):
    """Which hosts may be asked for by a URL in a request."""

    allowed_networks: tuple[str, ...] = Field(
        (), description="CIDR ranges that may be reached besides the public internet, such as 10.0.0.0/8"
    )
    allowed_ports: tuple[int, ...] = Field((80, 443), description="none: any port")
    connect_timeout_s: float = Field(10, gt=0)


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


class FrontSettings(Settings):
    """The `args` of the front application: gateway, dispatcher, webhooks."""

    queue_url: str = Field(
        "sqlite:///~/.local/share/darkroom/queue.sqlite3",
        description="the durable queue: SQLite, on a local disk of one node, or PostgreSQL, as "
        "postgresql://USER@HOST/DATABASE; its password may come from PGPASSWORD or PGPASSFILE, and with "
        "postgresql:/// all the rest from PGHOST, PGUSER and their like",
    )
    files_url: str = Field("file://~/.local/share/darkroom/files", description="where pictures are kept")
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


class ModelEntry(Settings):
    """What the front knows of a model application."""

    endpoints: tuple[str, ...] = Field(min_length=1, description="endpoint ids that it serves")
    window: int = Field(
        10,
        ge=1,
        description="requests handed to Serve at once: replicas × concurrency and a little; the last two "
        "places are for normal priority",
    )
    run_limit_s: float | None = Field(
        None,
        gt=0,
        description="a request that has run for so long fails with 504, its wait for a "
        "replica not counted; null: no limit",
    )
    prefetch: int = Field(
        16, ge=0, description="requests behind a full window whose weights are fetched meanwhile; 0: none"
    )
    licence: str | None = Field(None, max_length=100, description="of the weights, as callers are told")
    hardware: str | None = Field(None, max_length=100, description="what it runs on, as callers are told")
    example: dict[str, Any] | None = Field(
        None,
        description="fields to try it with, over those of the endpoints' own examples where they have them",
    )


class Catalogue(Settings):
    """The `user_config` of gateway and dispatcher: which application serves which endpoint."""

    models: dict[str, ModelEntry]

    @model_validator(mode="after")
    def _one_model_per_endpoint(self) -> "Catalogue":
        seen: dict[str, str] = {}
        for model, entry in self.models.items():
            for endpoint_id in entry.endpoints:
                if endpoint_id in seen:
                    raise ValueError(f"{endpoint_id} is served by both {seen[endpoint_id]} and {model}")
                seen[endpoint_id] = model
        return self

    def routes(self) -> dict[str, str]:
        """Endpoint id → application name."""
        return {endpoint_id: model for model, entry in self.models.items() for endpoint_id in entry.endpoints}


class FetchSettings(ReachSettings):
    """What a URL in a request may reach, and how much it may cost."""

    max_redirects: int = Field(3, ge=0)
    image_timeout_s: float = Field(60, gt=0, description="a whole image")
    weights_timeout_s: float = Field(1800, gt=0, description="a whole weights file")
    max_image_bytes: int = Field(MAX_IMAGE_BYTES, gt=0)
    max_weights_bytes: int = Field(8 * 2**30, gt=0)
    max_config_bytes: int = Field(64 * 2**10, gt=0, description="of a ControlNet's config.json")


class WeightSettings(Settings):
    """Where adapter weights named in requests come from, and where they are kept."""

    cache: str = Field("file://~/.cache/darkroom/weights", description="a folder on a local disk")
    cache_bytes: int = Field(50 * 2**30, gt=0, description="files unused for longest go first")
    hub: bool = Field(True, description="whether a request may name a Hugging Face repository")
    hub_url: str = "https://huggingface.co"
    easycontrols: dict[str, str] = Field(
        EASYCONTROLS, description="EasyControl's built-in methods: name → file, URL or Hub id"
    )
    names: dict[str, str] = Field(
        default_factory=dict, description="server-local names: name → file, URL or Hub id"
    )


class BaseSettings(Settings):
    """The base models, and UNets in their place, that requests may name, for endpoints that let them.

    Names of your own, and the model of the start, always may be named. `allow` is compared with the very
    text that the request gives. A file that a caller has uploaded to this server counts as of no site: it
    is taken only where `allow` has a plain "*".
    """

    names: dict[str, Annotated[str, Field(min_length=1)]] = Field(
        default_factory=dict,
        description="names of your own: name → zoo:NAME, a local folder or file, a URL or a Hub id; "
        "what is local is used where it lies",
    )
    allow: tuple[str, ...] = Field(
        ("*",),
        description="which other Hub ids and URLs may be named, * standing for anything: "
        "stabilityai/*, https://models.example/*; none: names only",
    )
    max_bytes: int = Field(30 * 2**30, gt=0, description="a whole model as it is downloaded")
    memory_bytes: int = Field(
        24 * 2**30, gt=0, description="memory of the device for base models, the one at the start included"
    )


class AutoscalingSettings(Settings):
    """How many replicas a model has between `min_replicas` and `max_replicas`."""

    policy: Literal["work", "requests"] = Field(
        "work",
        description="work: by the compute seconds of what waits and runs; requests: by their number against "
        "`concurrency`, Ray Serve's own policy",
    )
    target_wait_s: float = Field(10, gt=0, description="that a request may wait for its turn; of work only")
    low_target_wait_s: float = Field(120, gt=0, description="the same of low priority; of work only")
    start_s: float | None = Field(
        None, ge=0, description="until a new replica is ready; null: what they have taken; of work only"
    )
    hold_s: float = Field(120, ge=0, description="a replica goes when it has not been needed for so long")
    idle_s: float = Field(
        600, ge=0, description="where min_replicas is 0, the last one goes after so long without a request"
    )


class PictureSize(Settings):
    """Pixels."""

    width: int = Field(ge=64, le=4096)
    height: int = Field(ge=64, le=4096)


class SpeedSettings(Settings):
    """How the forwards run. But for `quantisation` and `acceleration`, pictures change by rounding only."""

    compile: Literal["none", "regional"] = Field(
        "none", description="regional: torch.compile of the repeated blocks; LoRA banks take twice the memory"
    )
    graphs: Literal["none", "auto"] = Field(
        "none",
        description="auto, beside compiled blocks on a GPU: forwards of `sizes` and `rows` are captured as "
        "CUDA graphs where that is measured to be faster",
    )
    sizes: tuple[PictureSize, ...] = Field(
        (PictureSize(width=1024, height=1024),),
        description="pictures whose forwards are made ready at the start; others are compiled as well, but "
        "never captured",
    )
    rows: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 2, 3, 4), description="rows of a forward that are made ready, as far as batch_tokens goes"
    )
    attention: Literal["sdpa", "auto"] = Field(
        "sdpa",
        description="sdpa: torch's own order of its kernels; auto: on a GPU the fastest by measurement at "
        "the start comes first",
    )
    channels_last: bool = Field(False, description="the memory format of convolutions")
    compile_vae: bool = Field(False, description="torch.compile of the VAE's decoder")
    quantisation: Literal["none", "fp8"] = Field(
        "none",
        description="fp8: the layers of FLUX's blocks multiply in float8; needs dtype bfloat16 and hardware "
        "for it",
    )
    acceleration: Literal["none", "regular", "high"] = Field(
        "none",
        description="of FLUX's text-to-image and image-to-image: a step whose first block changes its input "
        "much like at the last whole step reuses the other blocks' share of that one; high: more often",
    )
    cache: str = Field(
        "~/.cache/darkroom/compiled", description="a folder on a local disk for what has been compiled"
    )

    @property
    def compiles(self) -> bool:
        return self.compile != "none" or self.compile_vae

    @model_validator(mode="after")
    def _graphs_of_compiled_blocks(self) -> "SpeedSettings":
        if self.graphs != "none" and self.compile == "none":
            raise ValueError("speed.graphs: auto needs compile: regional")
        return self


class ModelSettings(Settings):
    """The `args` of a model application: one resident base model and the endpoints it serves."""

    model: str = Field(description="zoo:NAME, a local folder, or a Hub id")
    endpoints: tuple[str, ...] = Field(min_length=1)
    safety_checker: str | None = Field(
        None, description="the same kinds of source; null: requests that ask for it are not checked"
    )
    safety: SafetyPolicy = Field(
        "asked",
        description="which pictures are checked: those of requests with enable_safety_checker, or all, "
        "whatever requests say, and without previews",
    )
    device: Annotated[str, Field(pattern=r"^(cpu|cuda|mps)(:\d+)?$")] = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_sequence_length: int = Field(512, ge=1, le=512, description="T5 tokens of a prompt")
    batch_tokens: int = Field(
        16_384, gt=0, description="image tokens that one forward may hold; 1024 × 1024 has 4096"
    )
    batch_rows: int | None = Field(
        None,
        ge=1,
        description="pictures of one shape in a forward, if they fit; null: as many as gain, which a replica "
        "on a GPU measures when it starts, for some seconds; on a CPU as many as fit",
    )
    lora_rank: int = Field(128, ge=0, description="total rank of the LoRAs resident beside the model")
    adapter_bytes: int = Field(
        12 * 2**30,
        ge=0,
        description="memory of the device for what requests put beside the model: ControlNets, "
        "IP-Adapters, image encoders, UNets that light anew",
    )
    redux: str | None = Field(
        None, description="FLUX.1 Redux, the same kinds of source; null: fill_image is refused"
    )
    depth: str | None = Field(
        None, description="a Depth-Anything model; null: depth preprocessing is refused"
    )
    controlnet: str | None = Field(
        None, description="an SDXL canny ControlNet, the same kinds of source; the canny endpoint needs it"
    )
    finds_edges: bool = Field(
        True,
        description="whether control images are pictures to find edges in; false: they are edges already",
    )
    expander: str | None = Field(
        None, description="a small causal language model for expand_prompt; null: prompts stay as they are"
    )
    bases: BaseSettings = BaseSettings()
    faces: dict[str, str] = Field(
        default_factory=dict,
        description="insightface's model packs for adapters of faces: name → local folder",
    )
    noise_bytes: int = Field(2**28, ge=0, description="RAM for the structured noise of inversions")
    lora_ram_bytes: int = Field(4 * 2**30, ge=0, description="LoRA files kept in RAM")
    text_cache_bytes: int = Field(
        2**28, ge=0, description="memory of the device for encoded texts, in case they come again; 0: none"
    )
    picture_cache_bytes: int = Field(
        2**26, ge=0, description="the same for pictures that the VAE has encoded"
    )
    cpu_threads: int | None = Field(None, ge=1, description="torch threads; null: all cores")
    picture_decoders: int = Field(
        2, ge=1, description="processes that decode the pictures in requests, at most 0.5 GiB each"
    )
    speed: SpeedSettings = SpeedSettings()
    limits: Limits = Limits()
    fetch: FetchSettings = FetchSettings()
    weights: WeightSettings = WeightSettings()
    files_url: str = FrontSettings.model_fields["files_url"].default
    num_gpus: float = Field(0, ge=0, description="GPUs of a replica; a fraction shares one")
    num_cpus: float = Field(1, ge=0)
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    autoscaling: AutoscalingSettings = AutoscalingSettings()
    concurrency: int = Field(8, ge=1, description="requests that one replica runs at once")
    drain_s: float = Field(120, gt=0, description="longest wait for running images at a shutdown")
    node_labels: dict[str, str] = Field(
        default_factory=dict, description="Ray labels of the nodes that replicas may run on; none: any node"
    )
    entry_node_labels: dict[str, str] = Field(
        default_factory=dict,
        description="the same for the entry, which always runs: on a node with a GPU it would keep that up",
    )

    @model_validator(mode="after")
    def _fp8_beside_bfloat16(self) -> "ModelSettings":
        if self.speed.quantisation == "fp8" and self.dtype != "bfloat16":
            raise ValueError(f"speed.quantisation: fp8 needs dtype: bfloat16, not {self.dtype}")
        return self

    @model_validator(mode="after")
    def _can_check(self) -> "ModelSettings":
        if self.safety == "always" and self.safety_checker is None:
            raise ValueError("safety: always needs a safety_checker")
        return self

    @model_validator(mode="after")
    def _replicas_in_order(self) -> "ModelSettings":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) exceeds max_replicas ({self.max_replicas})")
        return self


def local_path(url: str, scheme: str) -> Path | None:
    """The path in a `scheme://` URL with ~ expanded, or None when the URL has another scheme."""
    prefix = f"{scheme}://"
    return Path(url.removeprefix(prefix)).expanduser().absolute() if url.startswith(prefix) else None
