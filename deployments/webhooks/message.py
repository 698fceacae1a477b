"""What a webhook says, in fal's words: its body, and the headers that sign it.

https://docs.fal.ai/model-apis/model-endpoints/webhooks
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

_UNSPEAKABLE = "Response payload is not JSON serializable."


def body(request_id: str, status: int, payload: dict[str, Any]) -> bytes:
    """The JSON that tells how a request ended; `status` and `payload` are its HTTP answer's."""
    document: dict[str, Any] = {"request_id": request_id, "gateway_request_id": request_id}
    if status == 200:
        document |= {"status": "OK"}
    else:
        document |= {"status": "ERROR", "error": f"Invalid status code: {status}"}
    try:
        return _json(document | {"payload": payload})
    except ValueError:  # NaN, infinity
        return _json(document | {"payload": None, "payload_error": _UNSPEAKABLE})


def headers(
    sign: Callable[[bytes], bytes], request_id: str, tenant: str, at: float, body: bytes
) -> dict[str, str]:
    """The headers of a try that begins at the unix second `at`: receivers take it for five minutes."""
    user_id = tenant if tenant.isascii() and tenant.isprintable() else quote(tenant)
    timestamp = str(int(at))
    signature = sign(signed_text(request_id, user_id, timestamp, body))
    return {
        "Content-Type": "application/json",
        "X-Fal-Webhook-Request-Id": request_id,
        "X-Fal-Webhook-User-Id": user_id,
        "X-Fal-Webhook-Timestamp": timestamp,
        "X-Fal-Webhook-Signature": signature.hex(),
    }


def signed_text(request_id: str, user_id: str, timestamp: str, body: bytes) -> bytes:
    """What the signature is over: three headers and the body's digest, a line each."""
    return "\n".join([request_id, user_id, timestamp, hashlib.sha256(body).hexdigest()]).encode()


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
