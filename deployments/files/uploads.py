"""Takes files from clients into the file store, whole or in parts.

    uploads/KEY/RANDOM      a part on its way
    uploads/KEY/3-DIGEST    a part that has arrived
    details/KEY             written once, before the file: of which parts KEY is made, for good
    secret                  signs tickets and passes

A ticket is all there is to an upload that has not begun: it names the key and the content type, so
nothing has to be remembered, and every process that shares the store takes it. The secret lies in the
store because it guards nothing else: whoever reads the folder has the files already.

A part is stored under a digest of its content, and `complete` names parts by it. So parts may come in
any order, at once, and again. Completing again with the same parts changes nothing; clients that have
lost our answer do that. Completing with others is refused: what a key names never changes.
"""

import asyncio
import hashlib
import re
import secrets
from collections.abc import AsyncIterator, Mapping
from functools import cached_property

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from pydantic import BaseModel, ConfigDict

from deployments import crash
from deployments.files import shown
from deployments.files.signatures import Signer
from deployments.files.store import CHUNK_BYTES, Details, FileStore, new_key, sent_name, told
from schemas.errors import BadRequest, BodyTooLarge, Forbidden, StoreFull

TICKET_S = 24 * 3600.0
SLACK_S = 3600.0  # what began in time may end so much later
MAX_PARTS = 10_000

CHUNKS = 4  # of an upload that are in memory, each of the size that the place takes

_PART = re.compile(r"(\d{1,5})-([0-9a-f]{32})")


class Ticket(BaseModel):
    """Leave to send one file."""

    model_config = ConfigDict(frozen=True)

    key: str
    content_type: str
    keep_s: int | None = None  # how long the file is kept once it is there; None: for good
    until: float


class Pass(BaseModel):
    """Leave to send any number of files."""

    model_config = ConfigDict(frozen=True)

    until: float


class Uploads:
    """One per process; processes that share the file store share its uploads."""

    def __init__(self, files: FileStore, max_bytes: int, min_free_bytes: int = 0) -> None:
        self._files = files
        self._objects = files.objects
        self._place = files.place
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes

    async def begin(self, name: str | None, content_type: str, keep_s: int | None) -> Ticket:
        """Leave to send a file. Nothing is stored yet. Raises StoreFull."""
        self._check_free(0)
        until = self._files.clock() + TICKET_S
        key = new_key(name, content_type)
        return Ticket(key=key, content_type=content_type, keep_s=keep_s, until=until)

    def issue(self) -> Pass:
        """Leave to send files for a day."""
        return Pass(until=self._files.clock() + TICKET_S)

    def sign(self, word: Ticket | Pass) -> str:
        """The form in which a client carries it."""
        return self._signer.write(word)

    def ticket(self, text: str, key: str) -> Ticket:
        """The ticket for `key` that a client shows. Raises Forbidden."""
        try:
            ticket = self._signer.read(Ticket, text)
        except ValueError:
            ticket = None
        if ticket is None or ticket.key != key:
            raise Forbidden("This upload URL was not signed by this server, or has been changed.")
        if ticket.until <= self._files.clock():
            raise Forbidden("This upload URL has expired; begin the upload again.")
        return ticket

    def admits(self, text: str) -> bool:
        """Whether `text` is a pass that is still good."""
        try:
            return self._signer.read(Pass, text).until > self._files.clock()
        except ValueError:
            return False

    async def receive(
        self, ticket: Ticket, number: int, chunks: AsyncIterator[bytes], declared: int | None = None
    ) -> str:
        """Keep a part as its bytes come; returns the tag by which `complete` names it.

        Raises BadRequest, BodyTooLarge, StoreFull and StoreDown; then nothing is kept.
        """
        if not 1 <= number <= MAX_PARTS:
            raise BadRequest(f"A part number must be 1 to {MAX_PARTS}.")
        room = self._max_bytes - sum(
            size for other, size in (await self._sizes(ticket.key)).items() if other != number
        )
        if declared is not None and declared > room:
            raise self._too_large()
        self._check_free(declared or 0)
        spare = self._files.free_bytes - self._min_free_bytes
        digest = hashlib.sha256()

        async def counted() -> AsyncIterator[bytes]:
            count = 0
            async for block in _blocks(chunks):
                count += len(block)
                if count > room:
                    raise self._too_large()
                if count > spare:  # part of it is yet to be written
                    raise StoreFull()
                self._check_free(len(block))  # others take of it as well
                await asyncio.to_thread(digest.update, block)
                yield block

        place = f"uploads/{ticket.key}/{secrets.token_hex(16)}"
        with told():
            await self._put(place, counted(), ticket)
            crash.point("part.written")
            tag = digest.hexdigest()[:32]
            await obstore.rename_async(self._objects, place, f"uploads/{ticket.key}/{number}-{tag}")
        crash.point("part.arrived")
        return tag

    async def complete(self, ticket: Ticket, parts: Mapping[int, str]) -> None:
        """Make the file of the parts `{number: tag}`. When this returns, its key can be opened.

        Raises BadRequest for parts that are missing, Forbidden when the key has other content, StoreFull.
        """
        content = hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()
        details = await self._files.details(ticket.key)
        if details is None:
            await self._check(ticket.key, parts)
            crash.point("upload.checked")
            details = await self._claim(ticket, content)
        if details.content != content:
            raise Forbidden("This upload URL has been used for another content; begin a new upload.")
        if not await self._files.is_there(ticket.key):
            await self._publish(ticket, parts)
            crash.point("upload.published")
        with told():
            await self._place.clear(f"uploads/{ticket.key}")
        crash.point("upload.cleared")

    @cached_property
    def _signer(self) -> Signer:
        with told():
            return Signer(self._place.secret())

    async def _sizes(self, key: str) -> dict[int, int]:
        """How large each part is that has arrived; of several tries, the largest."""
        sizes: dict[int, int] = {}
        for (number, _), size in (await self._arrived(key)).items():
            sizes[number] = max(size, sizes.get(number, 0))
        return sizes

    async def _arrived(self, key: str) -> dict[tuple[int, str], int]:
        """(number, tag) → bytes."""
        found: dict[tuple[int, str], int] = {}
        with told():
            async for batch in obstore.list(self._objects, f"uploads/{key}"):
                for each in batch:
                    if part := _PART.fullmatch(each["path"].rpartition("/")[2]):
                        found[int(part[1]), part[2]] = each["size"]
        return found

    async def _check(self, key: str, parts: Mapping[int, str]) -> None:
        arrived = await self._arrived(key)
        for number in range(1, max(parts, default=1) + 1):
            if (number, parts.get(number)) not in arrived:
                raise BadRequest(f"Part {number} is missing, or it is not the one that has arrived.")
        size = sum(arrived[part] for part in parts.items())
        if size > self._max_bytes:
            raise self._too_large()
        if len(parts) > 1:  # they are copied together
            self._check_free(size)

    async def _claim(self, ticket: Ticket, content: str) -> Details:
        """Say of what the key is made; returns what the first to say it said."""
        expires_at = None
        with told():
            if ticket.keep_s is not None:
                expires_at = self._files.clock() + ticket.keep_s
                await self._files.let_expire(ticket.key, expires_at)
                crash.point("upload.marked")
            details = Details(content_type=ticket.content_type, content=content, expires_at=expires_at)
            text = details.model_dump_json().encode()
            try:
                await obstore.put_async(self._objects, f"details/{ticket.key}", text, mode="create")
                crash.point("upload.claimed")
            except AlreadyExistsError:
                return await self._files.details(ticket.key) or details
        return details

    async def _publish(self, ticket: Ticket, parts: Mapping[int, str]) -> None:
        """Give the file its name. It is whole from the first moment."""
        key = ticket.key
        places = [f"uploads/{key}/{number}-{tag}" for number, tag in sorted(parts.items())]
        with told():
            try:
                if len(places) == 1:
                    await obstore.rename_async(self._objects, places[0], key)
                else:
                    whole = f"uploads/{key}/{secrets.token_hex(16)}"
                    await self._put(whole, self._joined(places), ticket)
                    crash.point("upload.joined")
                    await obstore.rename_async(self._objects, whole, key)
            except (FileNotFoundError, BaseError) as error:
                if await self._files.is_there(key):
                    return  # another call was faster, and has removed the parts
                if isinstance(error, BaseError):
                    raise
                raise BadRequest("A part is missing; begin the upload again.") from error

    async def _put(self, name: str, chunks: AsyncIterator[bytes], ticket: Ticket) -> None:
        headers = shown.headers(ticket.content_type, sent_name(ticket.key), ticket.keep_s)
        await obstore.put_async(
            self._objects,
            name,
            chunks,
            attributes=self._place.attributes(headers),
            use_multipart=True,
            chunk_size=self._place.block_bytes,
            max_concurrency=CHUNKS,
        )

    async def _joined(self, places: list[str]) -> AsyncIterator[bytes]:
        for place in places:
            found = await obstore.get_async(self._objects, place)
            async for chunk in found.stream(CHUNK_BYTES):
                yield bytes(chunk)

    def _check_free(self, coming: int) -> None:
        """Raise StoreFull where so many bytes more would take what is to stay free."""
        self._files.check_room(self._min_free_bytes + coming)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"A file may have at most {self._max_bytes} bytes here (max_upload_bytes).")


async def _blocks(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in larger pieces, each of which costs a few switches between threads."""
    block = bytearray()
    async for chunk in chunks:
        block += chunk
        if len(block) >= CHUNK_BYTES:
            yield bytes(block)
            block.clear()
    yield bytes(block)
