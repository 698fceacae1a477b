"""What a caller asks beside its input, in headers and query parameters."""

from starlette.requests import HTTPConnection, Request

from deployments import traces
from deployments.gateway import lifecycle, retries
from deployments.gateway.addresses import parse_url
from deployments.gateway.flags import flag
from deployments.gateway.gateway import Wishes
from schemas.errors import BadRequest
from schemas.jobs import Priority

PREVIEWS = "x-darkroom-previews"
MIN_START_TIMEOUT_S = 0.1
MAX_TAGS = 20
MAX_KEY = 255  # characters of an Idempotency-Key


def base_url(request: HTTPConnection) -> str:
    """How the caller reached us, as far as a proxy in front tells. Raises BadRequest."""
    forwarded = request.headers.get("x-forwarded-host")
    host = forwarded or request.headers.get("host") or ""
    scheme = request.headers.get("x-forwarded-proto") or request.url.scheme
    scheme = {"ws": "http", "wss": "https"}.get(scheme, scheme)
    text = f"{scheme.split(',')[0].strip()}://{host.split(',')[0].strip()}"
    url = parse_url(text)
    if url is None or url.username is not None or url.netloc != text.partition("://")[2]:
        raise BadRequest("The Host header is missing or malformed.")
    return text


def wants_previews(request: Request) -> bool:
    """Whether a submit asks that pictures be shown as they form, in its status stream. Raises BadRequest."""
    return flag(request.headers, PREVIEWS, default=False)


def read(request: Request, *, previews: bool, waits: bool = False) -> Wishes:
    """Raises BadRequest for what is malformed."""
    low = request.headers.get("x-fal-queue-priority", "").lower() == "low"
    return Wishes(
        priority=Priority.LOW if low else Priority.NORMAL,
        start_timeout_s=_start_timeout(request),
        webhook_url=_webhook_url(request),
        max_queue_length=_max_queue_length(request),
        previews=previews,
        waits=waits,
        max_retries=retries.most(request.headers),
        stores_io=flag(request.headers, "x-fal-store-io", default=True),
        tags=_tags(request),
        idempotency_key=_idempotency_key(request),
        keep_s=lifecycle.keep_s(request.headers, lifecycle.PREFERRED),
        traceparent=traces.continued(request.headers.getlist("traceparent")),
    )


def _idempotency_key(request: Request) -> str | None:
    """draft-ietf-httpapi-idempotency-key-header"""
    text = request.headers.get("idempotency-key")
    if text is not None and not (text.isascii() and text.isprintable() and 1 <= len(text) <= MAX_KEY):
        raise BadRequest(f"Idempotency-Key must be 1 to {MAX_KEY} printable ASCII characters.")
    return text


def _tags(request: Request) -> tuple[str, ...]:
    """Words between commas."""
    words = (word.strip() for word in request.headers.get("x-fal-tags", "").split(","))
    tags = tuple(dict.fromkeys(word for word in words if word))
    if len(tags) > MAX_TAGS or not all(tag.isprintable() and len(tag) <= 100 for tag in tags):
        raise BadRequest(f"x-fal-tags must be at most {MAX_TAGS} words of up to 100 printable characters.")
    return tags


def _webhook_url(request: Request) -> str | None:
    text = request.query_params.get("fal_webhook")
    if text is not None and parse_url(text) is None:
        raise BadRequest("fal_webhook must be an http or https URL.")
    return text


def _max_queue_length(request: Request) -> int | None:
    text = request.query_params.get("fal_max_queue_length")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise BadRequest("fal_max_queue_length must be a whole number.")
    return int(text)


def _start_timeout(request: Request) -> float | None:
    for name in ("x-fal-request-start-timeout", "x-fal-request-timeout"):
        if (text := request.headers.get(name)) is None:
            continue
        try:
            seconds = float(text)
        except ValueError:
            seconds = float("nan")
        if not MIN_START_TIMEOUT_S < seconds < float("inf"):
            raise BadRequest(f"{name} must be a number of seconds above {MIN_START_TIMEOUT_S}.")
        return seconds
    return None
