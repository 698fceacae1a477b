"""Which service a request is for, and what its path names. Pure functions over strings.

fal.ai tells its services apart by host name. Here they are path prefixes; requests that come in any
other way are brought to that form, in this order:

1. a prefix: `/run/…`, `/queue/…`, `/rest/…`, `/cdn/…`;
2. `/api/fal/proxy`: by the host in `x-fal-target-url`;
3. a host name of fal's, or one that begins like it (`queue.`, `rest.`, `v3.`);
4. a bare path: the queue if it names a request or carries what only submits carry, else a run.

Some clients, such as Hugging Face's, follow a URL that we told by its path alone, below what they take for
the service's base: of two prefixes, `/queue/queue/…`, the second counts.

fal keeps files on the CDN; here `/cdn/files/…` is another name of `/files/…`. What fal's platform tells of
its models, here `/v1/…` and `/openapi/…`, has no prefix, nor have the pages of the playground. The keys that
webhooks are verified by are at `/.well-known/jwks.json`, whatever the host is called.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import SplitResult, parse_qs, urlsplit

from schemas.errors import BadRequest, NotFound, RequestNotFound, TargetRefused

PROXY_PATH = "/api/fal/proxy"
TARGET_HEADER = "x-fal-target-url"
OWN_PATHS = ("/", "/health", "/ready", "/playground")
PAGES = "/playground/"
FILES = "/files/"
BARE_JWKS = "/.well-known/jwks.json"  # whatever the host is called
JWKS = f"/rest{BARE_JWKS}"
PLATFORM = ("/v1/", "/openapi/", "/api/openapi/")  # at fal below api.fal.ai and fal.ai
SERVICES = ("run", "queue", "rest", "cdn")

_HOSTS = {
    "fal.run": "run",
    "queue.fal.run": "queue",
    "rest.fal.ai": "rest",
    "rest.alpha.fal.ai": "rest",
    "v3.fal.media": "cdn",
    "v3b.fal.media": "cdn",
    "fal.media": "cdn",  # fal's Python client before 0.5
}
_PLATFORM_HOSTS = ("api.fal.ai", "fal.ai")
_HOST_PREFIXES = {"queue.": "queue", "rest.": "rest", "v3.": "cdn"}
_SUBMIT_QUERY = {"fal_webhook", "fal_max_queue_length"}
_NETLOC = re.compile(r"([^@/\s]+@)?([\w.-]+|\[[0-9A-Fa-f:.]+\])(:\d+)?", re.ASCII)
_REQUEST_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class Address:
    """A path below a service prefix, and the query that goes with it."""

    path: str
    query: str


def canonical(path: str, query: str, headers: Mapping[str, str]) -> Address:
    """The address in its prefixed form. Header names are lower case.

    Raises BadRequest for a proxy call without a target, TargetRefused for a target that is not fal's or ours.
    """
    address = _prefixed(path, query, headers)
    path = _without_base(address.path)
    return Address(path.removeprefix("/cdn") if path.startswith(f"/cdn{FILES}") else path, address.query)


def _prefixed(path: str, query: str, headers: Mapping[str, str]) -> Address:
    if path.rstrip("/") == PROXY_PATH:
        return _proxied(headers)
    if path == BARE_JWKS:
        return Address(JWKS, query)
    if path in OWN_PATHS or path.startswith((FILES, PAGES, *PLATFORM)) or _prefix(path) in SERVICES:
        return Address(path, query)
    service = _service_of_host(headers.get("host", "")) or _service_of_bare(path, query, headers)
    return Address(f"/{service}{path}", query)


def parse_url(text: str) -> SplitResult | None:
    """An http or https URL with a plain host, or None."""
    try:
        url = urlsplit(text)
        url.port  # noqa: B018 - raises for a port that is none
    except ValueError:
        return None
    is_plain = _NETLOC.fullmatch(url.netloc) is not None
    return url if url.scheme in ("http", "https") and is_plain else None


def _without_base(path: str) -> str:
    """What is left of two prefixes."""
    rest = path.removeprefix(f"/{_prefix(path)}")
    return rest if _prefix(path) in SERVICES and _prefix(rest) in SERVICES else path


def _prefix(path: str) -> str:
    return path.lstrip("/").partition("/")[0] if path.startswith("/") else ""


def _proxied(headers: Mapping[str, str]) -> Address:
    target = headers.get(TARGET_HEADER)
    if not target:
        raise BadRequest(f"The proxy needs the header {TARGET_HEADER}.")
    url = parse_url(target)
    if url is None:
        raise BadRequest(f"{TARGET_HEADER} is not an http or https URL.")
    host = url.hostname or ""
    if service := _HOSTS.get(host):
        return Address(f"/{service}{url.path}", url.query)
    is_ours = url.netloc == headers.get("host") and _prefix(url.path or "/") in SERVICES
    if is_ours or (host in _PLATFORM_HOSTS and url.path.startswith(PLATFORM)):
        return Address(url.path, url.query)
    raise TargetRefused(f"The proxy serves fal's hosts only ({', '.join(_HOSTS)}), not {host!r}.")


def _service_of_host(host: str) -> str | None:
    name = host.partition(":")[0].lower()
    if service := _HOSTS.get(name):
        return service
    return next((s for prefix, s in _HOST_PREFIXES.items() if name.startswith(prefix)), None)


def _service_of_bare(path: str, query: str, headers: Mapping[str, str]) -> str:
    names_request = "/requests/" in path
    is_submit = "x-fal-queue-priority" in headers or _SUBMIT_QUERY & parse_qs(query).keys()
    return "queue" if names_request or is_submit else "run"


class Verb(StrEnum):
    """What a path below /queue asks for."""

    SUBMIT = "submit"
    STATUS = "status"
    STATUS_STREAM = "status/stream"
    RESULT = "result"
    CANCEL = "cancel"


METHODS: Mapping[Verb, tuple[str, ...]] = {
    Verb.SUBMIT: ("POST", "GET"),
    Verb.STATUS: ("GET", "HEAD"),
    Verb.STATUS_STREAM: ("GET",),
    Verb.RESULT: ("GET", "HEAD"),
    Verb.CANCEL: ("PUT",),
}

_TAILS = {
    (): Verb.RESULT,
    ("response",): Verb.RESULT,
    ("status",): Verb.STATUS,
    ("status", "stream"): Verb.STATUS_STREAM,
    ("cancel",): Verb.CANCEL,
}


@dataclass(frozen=True, slots=True)
class QueuePath:
    """A path below /queue. `app` is the full endpoint id of a submit; otherwise owner/alias, or the
    full id, which some callers paste."""

    verb: Verb
    app: str
    request_id: str = ""


def queue_path(path: str) -> QueuePath:
    """Read a path below /queue. Raises NotFound. A trailing slash means nothing."""
    parts = path.strip("/").split("/")
    if "requests" not in parts[2:]:
        return QueuePath(Verb.SUBMIT, "/".join(parts))
    at = parts.index("requests", 2)
    app, (request_id, *tail) = "/".join(parts[:at]), (parts[at + 1 :] or [""])
    verb = _TAILS.get(tuple(tail))
    if verb is None:
        raise NotFound(f"Path /{'/'.join(parts[at:])} not found")
    check_request_id(request_id)
    return QueuePath(verb, app, request_id)


def check_request_id(text: str) -> None:
    """Raise RequestNotFound for what is no request's id: PostgreSQL takes not every text."""
    if not _REQUEST_ID.fullmatch(text):
        raise RequestNotFound(f"Request {text!r} not found")


def application(endpoint_id: str) -> str:
    """owner/alias of an endpoint id: what request URLs are made of."""
    return "/".join(endpoint_id.split("/")[:2])


def belongs(endpoint_id: str, app: str) -> bool:
    """Whether a request of `endpoint_id` may be asked for under `app`."""
    return app in (application(endpoint_id), endpoint_id)
