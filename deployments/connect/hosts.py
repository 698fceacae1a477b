"""fal's host names, and where on a server of ours what they serve is found."""

from dataclasses import dataclass
from urllib.parse import urlsplit

PREFIXES = {
    "fal.run": "/run",
    "queue.fal.run": "/queue",
    "rest.fal.ai": "/rest",
    "rest.alpha.fal.ai": "/rest",
    "v3.fal.media": "/cdn",
    "fal.media": "/cdn",  # fal's Python client before 0.5
}
_DOMAINS = ("fal.run", "fal.ai", "fal.media", "falrun.com")  # the last are the Python client's backups


def is_fals(name: str) -> bool:
    """Whether a host belongs to fal, served here or not."""
    return any(name == domain or name.endswith(f".{domain}") for domain in _DOMAINS)


@dataclass(frozen=True, slots=True)
class Server:
    """Where a darkroom server listens."""

    url: str
    host: str
    port: int
    is_tls: bool

    @property
    def netloc(self) -> str:
        """As it stands in a Host header."""
        return self.url.partition("://")[2]


def server_at(url: str) -> Server:
    """Raises ValueError for what is no http or https URL of a host."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.username:
        raise ValueError(f"{url!r} is not the http or https URL of a server, such as http://127.0.0.1:8000")
    is_tls = parts.scheme == "https"
    port = parts.port or (443 if is_tls else 80)
    return Server(f"{parts.scheme}://{parts.netloc}", parts.hostname, port, is_tls)
