"""Objects in a bucket that speaks S3: `s3://BUCKET/PREFIX?endpoint=…`.

    endpoint           where the store is, if it is not Amazon's; http:// is taken too
    region             its region; us-east-1 unless the environment says otherwise
    public_endpoint    the same store as clients reach it, if they reach it by another name
    presigned_s        how long a client may read a file by the URL that it is sent to, 3600 unless given;
                       0: files are handed out by this server

Credentials come from the environment alone, as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or in one of
Amazon's other ways. A connection that breaks leaves parts behind that S3 does not list as objects; a
lifecycle rule of the bucket (AbortIncompleteMultipartUpload) removes them.
"""

import secrets
from collections import defaultdict
from collections.abc import Mapping
from datetime import timedelta
from urllib.parse import parse_qsl, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import S3Store
from pydantic import Field, ValidationError

from deployments.files.place import Redirect
from deployments.files.signatures import SECRET_BYTES
from schemas.settings import Settings

BLOCK_BYTES = 5 * 2**20  # the least that S3 takes as a part
WEEK_S = 7 * 86_400  # the longest that a signature holds
CONNECT_TIMEOUT_S, TIMEOUT_S, RETRY_S = 5, 600, 15

_KEPT = {
    "content-type": "Content-Type",
    "content-disposition": "Content-Disposition",
    "cache-control": "Cache-Control",
}


class _Options(Settings):
    endpoint: str | None = Field(None, pattern="^https?://")
    public_endpoint: str | None = Field(None, pattern="^https?://")
    region: str | None = None
    presigned_s: int = Field(3600, ge=0, le=WEEK_S)


class Bucket:
    """See Place."""

    block_bytes = BLOCK_BYTES

    def __init__(self, url: str) -> None:
        """Raises ValueError for what is no URL of a bucket. Nothing is asked of the store yet."""
        parts = urlsplit(url)
        if not parts.hostname or parts.netloc != parts.hostname:
            raise ValueError(
                "files_url must be s3://BUCKET/PREFIX; credentials are taken from the environment only"
            )
        options = _options(parts.query)
        self._uri = f"s3://{parts.netloc}{parts.path.rstrip('/')}"
        self._presigned_s = options.presigned_s
        self.objects = self._connected(options.endpoint, options.region)
        self._outside = self._connected(options.public_endpoint or options.endpoint, options.region)

    def _connected(self, endpoint: str | None, region: str | None) -> S3Store:
        given = {"endpoint": endpoint, "region": region}
        return S3Store.from_url(
            self._uri,
            client_options={
                "allow_http": (endpoint or "").startswith("http://"),
                "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
                "timeout": timedelta(seconds=TIMEOUT_S),
            },
            retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=RETRY_S)},
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )

    def url(self, name: str) -> str:
        return f"{self._uri}/{name}"

    def secret(self) -> bytes:
        """Asked for once a process. Blocks."""
        try:
            obstore.put(self.objects, "secret", secrets.token_bytes(SECRET_BYTES), mode="create")
        except AlreadyExistsError:
            pass
        return bytes(obstore.get(self.objects, "secret").bytes())

    def free_bytes(self) -> None:
        return None

    def attributes(self, told: Mapping[str, str]) -> dict[str, str]:
        return {_KEPT[name]: value for name, value in told.items() if name in _KEPT}

    async def redirect(self, name: str, left_s: float | None) -> Redirect | None:
        lasts_s = self._presigned_s if left_s is None else min(self._presigned_s, int(left_s))
        if lasts_s <= 0:
            return None
        url = await obstore.sign_async(self._outside, "GET", name, timedelta(seconds=lasts_s))
        return Redirect(url, lasts_s)

    async def clear(self, folder: str) -> None:
        async for batch in obstore.list(self.objects, folder):
            await obstore.delete_async(self.objects, [each["path"] for each in batch])

    async def clear_left(self, folder: str, end: float) -> None:
        changed_at: dict[str, float] = defaultdict(float)
        async for batch in obstore.list(self.objects, folder):
            for each in batch:
                begun = each["path"].rpartition("/")[0]
                changed_at[begun] = max(changed_at[begun], each["last_modified"].timestamp())
        for begun, changed in changed_at.items():
            if changed <= end:
                await self.clear(begun)


def _options(query: str) -> _Options:
    try:
        return _Options.model_validate(dict(parse_qsl(query, keep_blank_values=True)))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ValueError(f"files_url: {faults}") from None
