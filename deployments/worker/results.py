"""What requests end with: pictures and traces, put into the file store or into the answer itself."""

import base64

from deployments.files.store import FileStore
from pipelines import images
from pipelines.base import Generation
from pipelines.exit import Encoded, Finished
from schemas.fields import File, PictureFile
from schemas.jobs import Job


class Results:
    """Stores what a replica makes. Used on one event loop."""

    def __init__(self, files: FileStore) -> None:
        self._files = files

    async def pictures(self, job: Job, generation: Generation, finished: Finished) -> tuple[PictureFile, ...]:
        """In the store, for as long as the job says, or inline where the request asked for that."""
        if generation.inline:
            return tuple(inline(each) for each in finished.pictures)
        return tuple([await self._picture(job, each) for each in finished.pictures])

    async def traces(self, job: Job, finished: Finished) -> dict[str, File]:
        """The tar files of a run, by the fields of the answer."""
        return {field: await self._trace(job, field, tar) for field, tar in finished.traces.items()}

    async def _picture(self, job: Job, encoded: Encoded) -> PictureFile:
        picture, data, kind = encoded.picture, encoded.data, images.content_type(encoded.format)
        key = await self._files.save(data, kind, job.keep_s)
        return PictureFile(
            url=self._files.url(key, job.base_url),
            content_type=kind,
            file_name=key,
            file_size=len(data),
            width=picture.width,
            height=picture.height,
        )

    async def _trace(self, job: Job, field: str, tar: bytes) -> File:
        kind = "application/x-tar"
        url = self._files.url(await self._files.save(tar, kind, job.keep_s), job.base_url)
        return File(url=url, content_type=kind, file_name=f"{field}.tar", file_size=len(tar))


def inline(encoded: Encoded) -> PictureFile:
    """A picture as a data URI."""
    picture, data, kind = encoded.picture, encoded.data, images.content_type(encoded.format)
    return PictureFile(
        url=f"data:{kind};base64,{base64.b64encode(data).decode()}",
        content_type=kind,
        file_name=f"image.{encoded.format}",
        file_size=len(data),
        width=picture.width,
        height=picture.height,
    )
