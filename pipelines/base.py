"""The contract of the pipelines: prepare → predict → finish.

`Pipeline.prepare` turns a request into samples, `Model.predict` runs inside the engine's loop on
samples of many requests and endpoints, `Pipeline.finish` turns a finished sample into a picture.
An endpoint is one Pipeline; the endpoints of a family share one Model. All of it is synchronous,
and nothing here knows of Ray, HTTP or a database.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from PIL.Image import Image as Picture
from pydantic import BaseModel
from torch import Tensor

from pipelines.engine.sample import Sample
from pipelines.images import Format
from schemas.errors import AssetError, Location
from schemas.fields import EndpointInput, File, Image, PictureFile
from schemas.settings import ModelSettings

InputT = TypeVar("InputT", bound=EndpointInput)
ModelT = TypeVar("ModelT", bound="Model")


class Model(ABC):
    """A family's resident weights."""

    attention = "sdpa"  # what computes it in a step: PyTorch's own; "sdpa (flash)" by the kernel it chose
    precision: str | None = None  # in which numbers it computes, where not in the settings' dtype
    float8_layers = 0  # how many of its layers multiply in float8

    @classmethod
    @abstractmethod
    def load(cls, settings: ModelSettings, locate: Callable[[str], Path | str]) -> Self:
        """Load `settings.model` and what belongs to it, onto `settings.device` in `settings.dtype`.

        `locate` turns a source in the settings into a local folder or a Hub id.
        """

    @abstractmethod
    def predict(self, samples: Sequence[Sample]) -> Sequence[Tensor]:
        """The prediction for each sample at its current step: one forward for all of them.

        The samples share a key. Answers have the shape of the sample's latents, in float32.
        """

    def warm(self) -> None:  # noqa: B027 - a model that needs none has none
        """Measure, compile and capture what the first requests will need; may take minutes on a GPU."""

    def decode_together(self, samples: Sequence[Sample]) -> Mapping[Sample, Tensor]:
        """The pixels [3, height, width] of those finished samples that are worth decoding in one call."""
        return {}

    def on_device(self) -> set[str]:
        """Which of `Assets.weights` are loaded, ready for a request: their paths, or the ends of those."""
        return set()

    def in_ram(self) -> set[str]:
        """The same of those that are kept in RAM, already read."""
        return set()


@dataclass(frozen=True, slots=True)
class Assets:
    """The files that a request names, fetched, by the fields that name them: ("body", "loras", 0, "path")."""

    images: Mapping[Location, Picture] = field(default_factory=dict)  # RGB, upright
    # safetensors, and folders with them; the names stand for the content
    weights: Mapping[Location, Path] = field(default_factory=dict)
    configs: Mapping[Location, bytes] = field(default_factory=dict)  # said to be JSON


@contextmanager
def named_by(loc: Location) -> Iterator[None]:
    """What goes wrong inside with a file is told of the field at `loc`: AssetError becomes InputError."""
    try:
        yield
    except AssetError as error:
        raise error.at(loc) from None


@dataclass(frozen=True, slots=True)
class Generation:
    """A request ready to run: its samples, and what becomes of their pictures."""

    samples: tuple[Sample, ...]  # one a picture, in order
    seed: int  # of the first picture; picture i uses seed + i
    format: Format
    check_safety: bool
    inline: bool  # pictures go into the answer as data URIs
    notes: tuple[str, ...] = ()  # what the caller should know of how the request is run
    resources: ExitStack = field(default_factory=ExitStack)  # what it holds; closed after the last use


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a generation, stored: what an endpoint's Output is made of."""

    pictures: tuple[PictureFile, ...]
    seed: int
    flags: tuple[bool, ...]  # marks pictures found unsafe
    timings: Mapping[str, float]  # seconds by stage and in the queue, `steps_per_second`, `rows`
    traces: Mapping[str, File] = field(default_factory=dict)  # tars of what `Pipeline.traces` names

    @property
    def images(self) -> list[Image]:
        """The pictures in the short form."""
        return [Image.of(each) for each in self.pictures]


@dataclass(frozen=True, slots=True)
class Glimpse:
    """A picture of the way to picture number `image`, under a file's name."""

    image: int
    name: str
    picture: Picture


class Pipeline(ABC, Generic[InputT, ModelT]):
    """One endpoint on its family's model. Holds no state of any request."""

    model_type: ClassVar[type[Model]]

    def __init__(self, model: ModelT) -> None:
        self.model = model

    def hold(self, request: InputT, assets: Assets) -> ExitStack:
        """Make resident what the request needs beside the model and is slow to load, until it is closed.

        Called before `prepare`, which finds it there, and on one of several threads: it may wait for
        room, while other requests are prepared. Raises InputError.
        """
        return ExitStack()

    @abstractmethod
    def prepare(self, request: InputT, assets: Assets, seed: int) -> Generation:
        """Encode the texts and images of a request and draw its noise.

        `assets` has the files that the request names; `seed` stands in where it has none. Raises
        InputError for what only the model can tell. May wait for room for its adapters, which the
        generation's `resources` then hold.
        """

    @abstractmethod
    def finish(self, sample: Sample) -> Picture:
        """Decode a finished sample. Raises NotFinite."""

    @abstractmethod
    def preview(self, sample: Sample) -> Picture:
        """A small and quick picture of a sample under way, after at least one step. Raises NotFinite."""

    def traces(self, generation: Generation) -> Mapping[str, Iterable[Glimpse]]:
        """Pictures of the way of a finished generation, by the field of the answer."""
        return {}

    @abstractmethod
    def answer(self, request: InputT, outcome: Outcome) -> BaseModel:
        """The endpoint's Output."""


AnyPipeline = Pipeline[Any, Any]
