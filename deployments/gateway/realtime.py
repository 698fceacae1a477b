"""A websocket on which each message is a request, and each answer its output, with the pictures in it.

Messages are msgpack maps, or JSON text; answers are msgpack. A connection runs one request at a time. What
comes meanwhile waits; of that only the newest few are kept, because a caller who types or draws wants the
last picture. Errors are text frames in fal's form, after which the connection goes on.
"""

import asyncio
import base64
from typing import Any

import msgpack
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from deployments.files.fetch import own_key
from deployments.gateway import body, tokens, wishes
from deployments.gateway.abandoned import abandon
from deployments.gateway.gateway import Caller, Gateway, Wishes
from deployments.gateway.keys import Keys
from schemas.errors import BadRequest, BodyTooLarge, DarkroomError, FieldError, InputError, NotAuthenticated

SUFFIX = "/realtime"
BUFFERING = 2  # messages that wait; what fal recommends
MAX_BUFFERING = 60  # what fal's clients let a caller ask for
REFUSED = 1008  # RFC 6455: policy violation

# In fal's words. Its JavaScript client keeps silent about it, and connects again with the next message.
IDLE = {"type": "x-fal-error", "error": "TIMEOUT", "reason": "no inputs, reconnect when needed!"}

Message = bytes | str
Inbox = asyncio.Queue[Message]


def routes(gateway: Gateway, keys: Keys) -> list[WebSocketRoute]:
    """Where connections are taken."""
    return [WebSocketRoute("/run/{path:path}", _Realtime(gateway, keys).serve)]


class _Realtime:
    def __init__(self, gateway: Gateway, keys: Keys) -> None:
        self._gateway = gateway
        self._keys = keys

    async def serve(self, socket: WebSocket) -> None:
        """One connection, to its end. Who is refused is told so: a browser sees nothing of a refusal
        before the connection stands."""
        await socket.accept()
        try:
            caller, endpoint_id, inbox = await self._admitted(socket)
        except NotAuthenticated as error:
            await _refuse(socket, error)
        except DarkroomError as error:
            await socket.send_json(_frame(error))
            await socket.close()
        else:
            await self._converse(socket, caller, endpoint_id, inbox)

    async def _admitted(self, socket: WebSocket) -> tuple[Caller, str, Inbox]:
        """Who calls, which endpoint, and room for what is to come. Raises DarkroomError."""
        path = str(socket.path_params["path"]).strip("/")
        given, token = socket.headers.getlist("authorization"), socket.query_params.get(tokens.QUERY)
        actor = await self._keys.actor(given, socket.state.address, token, path)
        base_url = self._gateway.settings.public_url or wishes.base_url(socket)
        endpoint_id = path if path in self._gateway.endpoints else path.removesuffix(SUFFIX)
        self._gateway.check(endpoint_id)
        return Caller(actor, base_url), endpoint_id, asyncio.Queue(_buffering(socket))

    async def _converse(self, socket: WebSocket, caller: Caller, endpoint_id: str, inbox: Inbox) -> None:
        """Read and answer until the caller leaves, or says nothing for long."""
        reading = asyncio.create_task(_read(socket, inbox))
        answering = asyncio.create_task(self._answer(socket, caller, endpoint_id, inbox))
        try:
            done, _ = await asyncio.wait([reading, answering], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises what went wrong, if anything did
        except WebSocketDisconnect:
            pass
        finally:
            reading.cancel()
            answering.cancel()
            await asyncio.wait([reading, answering])

    async def _answer(self, socket: WebSocket, caller: Caller, endpoint_id: str, inbox: Inbox) -> None:
        idle_s = self._gateway.settings.realtime_idle_s
        while True:
            try:
                async with asyncio.timeout(idle_s):
                    message = await inbox.get()
            except TimeoutError:
                await socket.send_json(IDLE)
                await socket.close()
                return
            try:
                await self._keys.check(caller.actor)
                fields = _fields(message, self._gateway.settings.max_body_bytes)
                answer = msgpack.packb(await self._output(fields, caller, endpoint_id))
            except NotAuthenticated as error:
                await _refuse(socket, error)
                return
            except DarkroomError as error:
                await socket.send_json(_frame(error))
            else:
                await socket.send_bytes(answer)

    async def _output(self, fields: dict[str, Any], caller: Caller, endpoint_id: str) -> dict[str, Any]:
        """Run one request like any other; the caller's leaving cancels it."""
        own_id = fields.pop("request_id", None)
        job = (await self._gateway.submit(endpoint_id, fields, caller, Wishes(waits=True))).job
        try:
            result = await self._gateway.result(job.request_id, job.tenant)
        except asyncio.CancelledError:
            abandon(self._gateway, job)
            raise
        output = await self._with_content(result.output(), job.base_url)
        return {**output, "request_id": own_id if isinstance(own_id, str) else job.request_id}

    async def _with_content(self, value: Any, base_url: str) -> Any:
        """An answer with its files in it."""
        if isinstance(value, list):
            return [await self._with_content(each, base_url) for each in value]
        if not isinstance(value, dict):
            return value
        url = value.get("url")
        if isinstance(url, str) and (content := await self._content(url, base_url)) is not None:
            return {name: each for name, each in value.items() if name != "url"} | {"content": content}
        return {name: await self._with_content(each, base_url) for name, each in value.items()}

    async def _content(self, url: str, base_url: str) -> bytes | None:
        if url.startswith("data:"):
            return base64.b64decode(url.partition(",")[2])
        return await self._gateway.files.content(own_key(url, base_url) or "")


async def _refuse(socket: WebSocket, error: NotAuthenticated) -> None:
    """Say why and close."""
    # the JavaScript client fetches a new token at this status; the Python client raises at this type
    await socket.send_json(_frame(error) | {"status": "error", "error": "Unauthorized"})
    await socket.close(REFUSED, error.message)


async def _read(socket: WebSocket, inbox: Inbox) -> None:
    """Take what comes; the oldest that waits makes room. Ends with the connection."""
    while (event := await socket.receive())["type"] != "websocket.disconnect":
        if inbox.full():
            inbox.get_nowait()
            await socket.send_json({"type": "x-fal-message", "action": "dropped"})
        inbox.put_nowait(event.get("bytes") or event.get("text") or b"")


def _buffering(socket: WebSocket) -> int:
    text = socket.query_params.get("max_buffering", str(BUFFERING))
    if not text.isascii() or not text.isdigit() or len(text) > 2 or not 1 <= int(text) <= MAX_BUFFERING:
        raise BadRequest(f"max_buffering must be a whole number from 1 to {MAX_BUFFERING}.")
    return int(text)


def _fields(message: Message, limit: int) -> dict[str, Any]:
    """The input that a message holds. Raises InputError, BodyTooLarge."""
    data = message if isinstance(message, bytes) else message.encode("utf-8", "surrogatepass")
    if len(data) > limit:
        raise BodyTooLarge(f"A message must have at most {limit} bytes; send files by URL instead.")
    if isinstance(message, str):
        return body.parse(data)
    try:
        value = msgpack.unpackb(message, object_hook=_named)
    except ValueError as error:
        raise _malformed(f"The message is not msgpack: {error}") from None
    if not isinstance(value, dict):
        raise _malformed("The message must be a map")
    body.check(value)  # its depth as well
    return {name: _plain(each) for name, each in value.items()}


def _named(value: dict[Any, Any]) -> dict[Any, Any]:
    """A map, if its keys are text."""
    if not all(isinstance(name, str) for name in value):
        raise ValueError("the keys of a map must be text")
    return value


def _malformed(reason: str) -> InputError:
    return InputError([FieldError(("body",), reason, "msgpack_invalid")])


def _plain(value: Any) -> Any:
    """Bytes are files, and the fields of an input name files by URL."""
    match value:
        case bytes():
            return f"data:application/octet-stream;base64,{base64.b64encode(value).decode()}"
        case dict():
            return {name: _plain(each) for name, each in value.items()}
        case list():
            return [_plain(each) for each in value]
    return value


def _frame(error: DarkroomError) -> dict[str, Any]:
    """An error in fal's form."""
    return {
        "type": "x-fal-error",
        "error": error.error_type.upper(),
        "reason": error.message,
        "detail": error.body()["detail"],
    }
