"""Headers that say yes or no."""

from starlette.datastructures import Headers

from schemas.errors import BadRequest

_WORDS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def flag(headers: Headers, name: str, *, default: bool) -> bool:
    """What a header says, in any case of letters. Raises BadRequest for other words."""
    text = headers.get(name)
    if text is None:
        return default
    if text.lower() not in _WORDS:
        raise BadRequest(f"{name} must be 1 or 0.")
    return _WORDS[text.lower()]
