"""The environment in which an unmodified program talks to a listener instead of to fal."""

from collections.abc import Mapping
from pathlib import Path

from deployments.connect.authority import Authority
from deployments.connect.hosts import Server

PRELOAD = Path(__file__).with_name("preload.mjs")
ANY_KEY = "darkroom:darkroom"  # fal's Python client insists on one, a server without keys on none
LOCAL = ("127.0.0.1", "localhost", "::1")


def variables(
    port: int, server: Server, authority: Authority, given: Mapping[str, str], key: str | None
) -> dict[str, str]:
    """What to set, beside what is `given`, for a listener at `port`."""
    proxy = f"http://127.0.0.1:{port}"
    direct = ",".join(dict.fromkeys((*LOCAL, server.host)))  # what a server's answers link to
    others = given.get("SSL_CERT_FILE")
    bundle = str(authority.bundle(Path(others) if others else None))
    set_ = {
        "HTTPS_PROXY": proxy,
        "https_proxy": proxy,
        "NO_PROXY": direct,
        "no_proxy": direct,
        "SSL_CERT_FILE": bundle,
        "REQUESTS_CA_BUNDLE": bundle,
        "CURL_CA_BUNDLE": bundle,
        "NODE_EXTRA_CA_CERTS": str(authority.certificate),
        "NODE_USE_ENV_PROXY": "1",  # from Node 24 on; before it, the preload
        "NODE_OPTIONS": _node_options(given.get("NODE_OPTIONS", "")),
        "DARKROOM_URL": server.url,
    }
    if key or not {"FAL_KEY", "FAL_KEY_ID"} & given.keys():
        set_["FAL_KEY"] = key or ANY_KEY
    return set_


def _node_options(given: str) -> str:
    ours = f"--experimental-websocket --import={PRELOAD.as_uri()}"
    return given if ours in given else f"{given} {ours}".strip()
