"""How a browser is told to treat a file: what a client has sent is shown, but never run."""

# Browsers show these themselves; all else is saved, so that no page of a stranger's opens.
_SHOWN = ("image/", "audio/", "video/", "text/plain")
_ACTIVE = ("image/svg",)  # may hold scripts

YEAR_S = 365 * 86_400


def headers(content_type: str, name: str | None, left_s: float | None) -> dict[str, str]:
    """By lower-case name. `left_s`: for how long the file is still there; no cache may show it longer."""
    age_s = YEAR_S if left_s is None else min(YEAR_S, int(left_s))
    return {
        "content-type": content_type,
        "content-disposition": _disposition(content_type.lower(), name),
        "cache-control": f"public, max-age={age_s}, immutable",
    }


def _disposition(kind: str, name: str | None) -> str:
    is_shown = kind.startswith(_SHOWN) and not kind.startswith(_ACTIVE)
    filename = f'; filename="{name}"' if name else ""
    return f"{'inline' if is_shown else 'attachment'}{filename}"
