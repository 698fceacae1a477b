"""OpenAI's image API over the same queue: https://platform.openai.com/docs/api-reference/images.

A field of OpenAI's becomes the endpoint's own by the tables below; a field that the endpoint has is taken as
it is, so that `extra_body={"seed": 7}` works. What neither knows is ignored and named in a header.
"""

import asyncio
import base64
import re
import time
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments.files.fetch import own_key
from deployments.gateway import answers, attendance, body, wishes
from deployments.gateway.abandoned import while_connected
from deployments.gateway.attendance import Attendance
from deployments.gateway.gateway import Accepted, Caller, Gateway
from pipelines import registry
from schemas.errors import BadRequest, BodyTooLarge, DarkroomError, FieldError, InputError, NotFound
from schemas.fields import EndpointInput

# OpenAI's word → an Input's. `image_url` is what every endpoint calls the picture to begin with.
FIELDS: Mapping[str, str] = {
    "n": "num_images",
    "size": "image_size",
    "image": "image_url",
    "image[]": "image_url",
    "mask": "mask_url",
}
_WORDS = {"num_images": "n", "image_size": "size", "image_url": "image", "mask_url": "mask"}

PREFIX = "/v1/images/"
MAX_PARTS = 64  # of a form
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)


def routes(gateway: Gateway, present: Attendance) -> list[Route]:
    """Where pictures are asked for in OpenAI's way."""
    http = _Images(gateway, present)
    return [
        Route(f"{PREFIX}generations", http.generations, methods=["POST"]),
        Route(f"{PREFIX}edits", http.edits, methods=["POST"]),
    ]


class _Images:
    def __init__(self, gateway: Gateway, present: Attendance) -> None:
        self._gateway = gateway
        self._attendance = present

    async def generations(self, request: Request) -> Response:
        return await self._answered(request, {"prompt"}, "generations")

    async def edits(self, request: Request) -> Response:
        return await self._answered(request, {"prompt", "image_url"}, "edits")

    async def _answered(self, request: Request, fields: set[str], verb: str) -> Response:
        """The pictures, or what went wrong, in OpenAI's shape."""
        try:
            return await self._pictures(request, fields, verb)
        except DarkroomError as error:
            return failure(error)
        except HTTPException as error:  # how Starlette tells of a broken form
            return failure(BadRequest(error.detail))

    async def _pictures(self, request: Request, fields: set[str], verb: str) -> Response:
        asked = await self._asked(request)
        shape = asked.pop("response_format", "b64_json")
        if shape not in ("b64_json", "url"):
            raise _wrong("response_format", "Give b64_json or url", "literal_error")
        if asked.pop("stream", False) in (True, "true"):
            raise _wrong("stream", "Pictures are not streamed here; leave it out", "unsupported")
        endpoint_id = self._endpoint_of(asked.pop("model", None), fields, verb)
        call = attendance.call(shape, request, endpoint_id, asked)
        accepted = self._attendance.returning(call) or await self._submit(request, endpoint_id, asked)
        job = accepted.job
        with self._attendance.visit(call, accepted) as visit:
            if await while_connected(request.receive, asyncio.wait([visit.result])) is None:
                return Response(status_code=499)  # nobody reads it
            visit.is_served = True
        output = visit.result.result().output()
        data = [await self._picture(image["url"], job.base_url, shape) for image in output["images"]]
        headers = {answers.REQUEST_ID: job.request_id, **answers.ignored_header(accepted.ignored)}
        return answers.Json({"created": int(time.time()), "data": data}, 200, headers)

    async def _submit(self, request: Request, endpoint_id: str, asked: Mapping[str, Any]) -> Accepted:
        base_url = self._gateway.settings.public_url or wishes.base_url(request)
        caller = Caller(request.state.actor, base_url)
        kind = registry.endpoint(endpoint_id).input_type()
        return await self._gateway.submit(
            endpoint_id, _fields(asked, kind), caller, wishes.read(request, previews=False, waits=True)
        )

    async def _asked(self, request: Request) -> dict[str, Any]:
        """The fields of a JSON body or of a form; null is as good as absent."""
        limit = self._gateway.settings.max_body_bytes
        declared = request.headers.get("content-length")
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            fields = body.parse(await body.read(request.stream(), declared, limit))
            return {name: value for name, value in fields.items() if value is not None}
        length = body.length(declared)
        if length is None or length > limit:
            raise BodyTooLarge(f"A form must say its length, at most {limit} bytes.")
        async with request.form(max_files=MAX_PARTS, max_fields=MAX_PARTS, max_part_size=limit) as form:
            return await _unpacked(form)

    def _endpoint_of(self, model: Any, required: set[str], verb: str) -> str:
        """By the name that the settings give it, by its id, or the first that needs no other fields."""
        served = self._gateway.endpoints
        if model is None:
            fits = [each for each in served if _required(each) == required]
            if fits:
                return fits[0]
            raise BadRequest(f"Nothing is served here for {verb} without the name of a model.")
        named = self._gateway.settings.openai_models.get(str(model))
        endpoint_id = getattr(named, verb) if named else str(model)
        if endpoint_id not in served:
            known = ", ".join([*self._gateway.settings.openai_models, *served])
            raise NotFound(f"The model {str(model)[:100]!r} does no {verb} here; known: {known}")
        return str(endpoint_id)

    async def _picture(self, url: str, base_url: str, shape: str) -> dict[str, str]:
        if shape == "url":
            return {"url": url}
        if url.startswith("data:"):
            return {"b64_json": url.partition(",")[2]}
        data = await self._gateway.files.content(own_key(url, base_url) or "")
        return {"url": url} if data is None else {"b64_json": base64.b64encode(data).decode()}


def _required(endpoint_id: str) -> set[str]:
    fields = registry.endpoint(endpoint_id).input_type().model_fields
    return {name for name, info in fields.items() if info.is_required()}


def _fields(asked: Mapping[str, Any], kind: type[EndpointInput]) -> dict[str, Any]:
    """What OpenAI's fields are called by an endpoint. Raises InputError for what it cannot do."""
    fields: dict[str, Any] = {}
    for word, value in asked.items():
        name = FIELDS.get(word, word)
        if name != word and name not in kind.model_fields and not _says_nothing(word, value):
            raise _wrong(word, "This model does not take it", "unsupported")
        if word == "size":
            value = _size(value)
        if name in fields:
            raise _wrong(word, "This model takes one picture", "too_long")
        if value is not None:
            fields[name] = value
    return fields


def _says_nothing(word: str, value: Any) -> bool:
    """Whether a value asks for what happens anyway."""
    return (word == "n" and str(value) == "1") or (word == "size" and value == "auto")


def _size(value: Any) -> Any:
    """`1024x768` → an image_size; fal's own names and objects are left as they are."""
    if value == "auto":
        return None
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    return {"width": int(match[1]), "height": int(match[2])} if match else value


async def _unpacked(form: FormData) -> dict[str, Any]:
    """A form's fields; files become data URIs."""
    fields: dict[str, Any] = {}
    for word, value in form.multi_items():
        if word in fields:
            raise _wrong(word, "Give it once", "too_long")
        if isinstance(value, UploadFile):
            data = base64.b64encode(await value.read()).decode()
            fields[word] = f"data:application/octet-stream;base64,{data}"
        else:
            fields[word] = value
    body.check(fields)
    return fields


def _wrong(word: str, message: str, kind: str) -> InputError:
    return InputError([FieldError(("body", word.removesuffix("[]")), message, kind)])


def failure(error: DarkroomError) -> Response:
    """OpenAI's shape. What the caller has to change is a 400 there."""
    detail = error.body()["detail"]
    fault = detail[0] if isinstance(detail, list) and detail else {"loc": (), "type": error.error_type}
    param = str(fault["loc"][1]) if len(fault["loc"]) > 1 else None
    told = {
        "message": error.message,
        "type": "server_error" if error.status >= 500 else "invalid_request_error",
        "param": _WORDS.get(param, param) if param else None,
        "code": fault["type"],
    }
    status = 400 if error.status == 422 else error.status
    headers = answers.failure_headers(error.status, error.error_type, error.retryable)
    headers["x-should-retry"] = str(error.retryable).lower()  # which OpenAI's clients obey
    return answers.Json({"error": told}, status, {**headers, **answers.retry_header(error)})
