"""Our engine and a pipeline with the threads of a worker, and nothing of the deployments around them."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

from PIL.Image import Image as Picture

from pipelines import images
from pipelines.base import AnyPipeline, Assets, Generation
from pipelines.decoding import Decoding, Waiting
from pipelines.engine.engine import Engine
from pipelines.engine.sample import Sample
from schemas.fields import EndpointInput


class Ours:
    """One thread prepares, the engine steps all samples together, one decodes.

    torch's number of threads must be set before, because a thread keeps what it finds at its start.
    """

    def __init__(self, pipeline: AnyPipeline, batch_tokens: int) -> None:
        self._pipeline = pipeline
        self._preparing, self._finishing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._engine = Engine(pipeline.model.predict, batch_tokens)
        self._engine.start()
        self._decoding = Decoding()

    def close(self) -> None:
        self._engine.close()

    def sample(self, request: EndpointInput, assets: Assets | None = None) -> Sample:
        """The finished sample of a request for one picture."""
        return self._denoise(self._generation(request, assets))

    def draw(self, request: EndpointInput, assets: Assets | None = None) -> Picture:
        return self._finishing.submit(self._finish, self._waiting(request, assets)).result()

    def _waiting(self, request: EndpointInput, assets: Assets | None) -> Waiting:
        generation = self._generation(request, assets)
        self._denoise(generation)
        return self._decoding.add(self._pipeline, generation)

    def _finish(self, waiting: Waiting) -> Picture:
        [sample], pixels = waiting.generation.samples, self._decoding.pixels(waiting)
        return images.from_tensor(pixels[sample]) if sample in pixels else self._pipeline.finish(sample)

    def _generation(self, request: EndpointInput, assets: Assets | None) -> Generation:
        return self._preparing.submit(self._pipeline.prepare, request, assets or Assets(), 0).result()

    def _denoise(self, generation: Generation) -> Sample:
        """Its one sample, finished."""
        [sample] = generation.samples
        listener = _Listener()
        self._engine.add(sample, listener)
        listener.done.wait()
        if listener.error is not None:
            raise listener.error
        return sample


class _Listener:
    def __init__(self) -> None:
        self.done = Event()
        self.error: BaseException | None = None

    def stepped(self, sample: Sample) -> None:
        pass

    def ended(self, sample: Sample, error: BaseException | None) -> None:
        self.error = error
        self.done.set()
