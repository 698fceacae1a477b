"""A model application: one base model, its endpoints, its replicas."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from schemas.settings.base import FILES_URL, Limits, Settings
from schemas.settings.speed import SpeedSettings
from schemas.settings.weights import BaseSettings, FetchSettings, WeightSettings

SafetyPolicy = Literal["asked", "always"]


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
    files_url: str = FILES_URL
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
