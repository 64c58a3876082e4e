"""Photos and fields of one request, as multipart or JSON, bounded while they are read."""

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from app.api.base64_texts import NotBase64, decoded, spelt_bytes
from app.api.bodies import MOST_MARKS, parsed, refuse_encodings
from app.api.dependencies import CurrentRuntime
from app.api.shapes import Body
from app.api.urlencoded import CHARSET_FIELD, require_utf8
from app.errors import Advice, TooLarge, UnsupportedMediaType, Validation

#: Room for the fields, part headers and boundaries around the photos.
FIELDS_BYTES = 64 * 1024
MAXIMUM_FIELDS = 32
#: Of a text in JSON, as it is spelt: a longer one is a photo's. Metadata, all of it escaped, has a little less.
LONGEST_TEXT = 32 * 1024
#: The parser of forms gets a body in slices. One slice takes about SLICE_SECONDS, so that the event loop can serve others in
#: between. The parser takes photos at gigabytes a second, and one-byte lines at a megabyte a second.
SLICE_SECONDS, SMALLEST_SLICE, LARGEST_SLICE = 0.002, 1024, 256 * 1024
#: What the parser of forms may work on one body; five photos take it a tenth. It walks through padding behind a boundary, and
#: through what only begins like one, at a millionth of a second a byte.
PARSER_SECONDS = 0.5
#: The most bytes that may come before the first boundary of a form (RFC 2046, 5.1.1: a preamble).
PREAMBLE_BYTES = 16 * 1024

#: Codings of a part that leave its bytes as they are (RFC 7578, 4.7 asks for no others).
_UNCODED = (b"7bit", b"8bit", b"binary")

F = TypeVar("F", bound=BaseModel)


class NoFields(Body):
    """No fields besides the photo."""


class _StrictParser(MultiPartParser):
    """Keeps every part in memory: a face in clear must not touch a disk. Bounded by the body's limit.

    Takes text in UTF-8 only. Starlette reads everything else as Latin-1, and passes over what a part says about its encoding.
    """

    spool_max_size = 2**31

    def on_headers_finished(self) -> None:
        """Look at what the part says about itself. Raises UnsupportedMediaType for a charset or coding that is not read here."""
        super().on_headers_finished()
        part = self._current_part
        for name, value in part.item_headers:
            if name == b"content-transfer-encoding" and value.strip().lower() not in _UNCODED:
                raise UnsupportedMediaType("Send each part of the form without a Content-Transfer-Encoding.")
            if name == b"content-type" and part.file is None:
                charset = parse_options_header(value)[1].get(b"charset", b"utf-8").lower()
                if charset != b"us-ascii":  # a part of UTF-8
                    require_utf8(charset.decode("latin-1"))

    def on_part_end(self) -> None:
        """Take the part. Raises Validation for text that is not UTF-8."""
        part = self._current_part
        if part.file is None:
            try:
                part.data.decode()
            except UnicodeDecodeError as error:
                message = "Send the field's text in UTF-8."
                raise Validation.of(part.field_name[:64], "not-utf-8", message) from error
        super().on_part_end()


@dataclass(frozen=True, slots=True)
class Upload(Generic[F]):
    """The fields, checked, and the photos' bytes by part name, in the order in which they came."""

    fields: F
    photos: dict[str, list[bytes]]
    _release: Callable[[], None]

    def discard_photos(self) -> None:
        """Drop the photos, and free the room that they took."""
        self.photos.clear()
        self._release()

    def digests(self) -> list[bytes]:
        """SHA-256 of each photo, in order. Blocking: up to 50 MiB."""
        return [hashlib.sha256(data).digest() for name in sorted(self.photos) for data in self.photos[name]]


def uploaded(model: type[F], *names: str, most: int = 1) -> Callable[[Request, CurrentRuntime], Awaitable[Upload[F]]]:
    """A dependency that reads one to `most` photos under each of the part names, and the fields of the model."""

    async def read(request: Request, runtime: CurrentRuntime) -> Upload[F]:
        refuse_encodings(request)
        limit = runtime.settings.max_photo_bytes
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            fields, photos = await _multipart(request, names, len(names) * most, limit)
        elif kind == "application/json":
            request.state.body_limit = len(names) * most * spelt_bytes(limit) + FIELDS_BYTES
            # Decoded in a thread: it may be five photos of ten megabytes in base64. `request.body()` would keep the bytes.
            spelt = [b"".join([piece async for piece in request.stream()])]
            fields, photos = await runtime.compute(_from_json, spelt, names, most, limit)
        else:
            raise UnsupportedMediaType("Send multipart/form-data or application/json.")
        for name in names:
            _check(name, photos.get(name, []), most, limit)
        try:
            return Upload(model.model_validate(fields), photos, getattr(request.state, "release_body", lambda: None))
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error

    return read


def body_of(model: type[BaseModel], *names: str, most: int = 1) -> dict[str, Any]:
    """The route's request body for OpenAPI, in both forms."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    properties, required = _self_contained(schema.get("properties", {})), schema.get("required", [])
    binary = {"type": "string", "format": "binary"}
    base64_text = {"type": "string", "contentEncoding": "base64"}
    parts: dict[str, Any] = {
        name: binary if most == 1 else {"type": "array", "items": binary, "minItems": 1, "maxItems": most}
        for name in names
    }
    texts: dict[str, Any] = {f"{name}_base64": base64_text for name in names}
    in_json = list(texts)
    if most > 1:
        texts |= {f"{name}s_base64": {"type": "array", "items": base64_text, "maxItems": most} for name in names}
        in_json = []  # one of the two
    multipart: dict[str, Any] = {
        "type": "object",
        "properties": {**parts, **properties},
        "required": [*parts, *required],
    }
    as_json: dict[str, Any] = {
        "type": "object",
        "properties": {**texts, **properties},
        "required": [*in_json, *required],
    }
    for one in (multipart, as_json):
        one["additionalProperties"] = False
    content = {"multipart/form-data": {"schema": multipart}, "application/json": {"schema": as_json}}
    return {"requestBody": {"required": True, "content": content}}


def _self_contained(schema: Any) -> Any:  # noqa: ANN401 - any part of a JSON schema
    """Without references to definitions, which stay behind: what they stand for may be any JSON."""
    if isinstance(schema, dict):
        return {} if "$ref" in schema else {name: _self_contained(part) for name, part in schema.items()}
    return schema


def _check(name: str, photos: list[bytes], most: int, limit: int) -> None:
    if not photos or not all(photos):
        message = "A photo is missing or empty."
        raise Validation(message, errors=(Advice(name, "photo-missing", message),))
    if len(photos) > most:
        message = f"At most {most} photos are taken here."
        raise Validation(message, errors=(Advice(name, "too-many-photos", message),))
    if any(len(data) > limit for data in photos):
        raise _too_large(name, limit)


def _too_large(name: str, limit: int) -> TooLarge:
    message = f"A photo may have {limit} bytes at most."
    return TooLarge(message, errors=(Advice(name, "too-large", message),))


async def _multipart(
    request: Request, names: tuple[str, ...], most_files: int, limit: int
) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    request.state.body_limit = most_files * limit + FIELDS_BYTES
    # One file more than allowed is let in, so that the answer can say so.
    parser = _StrictParser(
        request.headers,
        _in_bounded_time(_from_first_boundary(request)),
        max_files=most_files + 1,
        max_fields=MAXIMUM_FIELDS,
        max_part_size=FIELDS_BYTES,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        message = "The multipart body cannot be read."
        raise Validation(message, errors=(Advice("body", "multipart", error.message),)) from error
    fields: dict[str, Any] = {}
    photos: dict[str, list[bytes]] = {}
    try:
        for name, value in form.multi_items():
            if _is_blank(value):
                continue
            if isinstance(value, UploadFile):
                if name not in names:
                    message = "No photo is taken under this name."
                    raise Validation(message, errors=(Advice(name, "unknown-part", message),))
                photos.setdefault(name, []).append(await value.read())
                await value.close()  # else every photo is in memory twice
            elif name in names:
                message = "A photo is sent as a file part, with a file name."
                raise Validation(message, errors=(Advice(name, "photo-missing", message),))
            elif name == CHARSET_FIELD:
                require_utf8(value)
            elif name in fields:
                message = "The field came twice."
                raise Validation(message, errors=(Advice(name, "repeated", message),))
            else:
                fields[name] = parsed(name, value.encode()) if name == "metadata" else value
    finally:
        await form.close()
    return fields, photos


def _is_blank(value: UploadFile | str) -> bool:
    """Whether a person left this field of a form empty: a text of blanks, or no file chosen (no name, no bytes)."""
    return not (value.filename or value.size) if isinstance(value, UploadFile) else not value.strip()


async def _from_first_boundary(request: Request) -> AsyncGenerator[bytes, None]:
    """The body without what comes before its first boundary. Raises MultiPartException if that is too much, or all."""
    boundary = parse_options_header(request.headers.get("content-type"))[1].get(b"boundary", b"")
    # The first boundary may be the first line.
    marker, before = b"\r\n--" + boundary, bytearray(b"\r\n")
    pieces = aiter(request.stream())
    async for piece in pieces:
        searched = max(0, len(before) - len(marker))
        before += piece
        at = before.find(marker, searched)
        if at >= 0:
            yield bytes(before[at + 2 :])
            break
        if len(before) > PREAMBLE_BYTES:
            break
    else:
        at = -1
    if at < 0:
        message = f"No boundary is found in the first {PREAMBLE_BYTES} bytes."
        raise MultiPartException(message)
    del before
    async for piece in pieces:
        yield piece


async def _in_bounded_time(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The body as it comes, in slices. Raises MultiPartException when the parser needs more than PARSER_SECONDS."""
    taken, size = 0.0, 16 * SMALLEST_SLICE
    async for piece in pieces:
        start = 0
        while start < len(piece):
            began = time.thread_time()
            yield piece[start : start + size]
            took = time.thread_time() - began
            start += size
            taken += took
            if taken > PARSER_SECONDS:
                message = "It takes too long to find the parts."
                raise MultiPartException(message)
            if took > SLICE_SECONDS / 2:
                size = max(SMALLEST_SLICE, size // 2) if took > SLICE_SECONDS else size
                await asyncio.sleep(0)
            else:
                size = min(LARGEST_SLICE, size * 2)


def _from_json(
    spelt: list[bytes], names: tuple[str, ...], most: int, limit: int
) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """spelt: a list with the body, which is taken out of it. So the body is not in memory twice."""
    rest, long_texts = _long_texts_apart(spelt.pop())
    if len(rest) > FIELDS_BYTES + len(names) * most * LONGEST_TEXT:
        raise TooLarge(f"Beside its photos a body may have {FIELDS_BYTES} bytes at most.")
    fields = parsed("body", rest)
    photos: dict[str, list[bytes]] = {}
    for name in names:
        one, several = f"{name}_base64", f"{name}s_base64"
        texts = [fields.pop(one)] if one in fields else []
        if most > 1 and several in fields:
            more = fields.pop(several)
            texts += more if isinstance(more, list) else [more]
        if texts:
            photos[name] = [_decoded(one, text, long_texts, limit) for text in texts]
    if long_texts:
        message = f"But for photos, no text has more than {LONGEST_TEXT} bytes."
        raise Validation(message, errors=(Advice("body", "too-long", message),))
    return fields, photos


def _long_texts_apart(data: bytes) -> tuple[bytes, dict[str, bytes]]:
    """The body with a stand-in for each long stretch between two quotes, and what the stand-ins stand for.

    Nothing but photos is long, and to the JSON parser a byte may cost a hundred; so it is given the rest only. A stretch is one
    whole text where its stand-in comes out of the parser as one, and it can be read as one by itself. A stand-in that is no
    photo's in the end is a reason to refuse the body.
    """
    pieces, apart = data.split(b'"', MOST_MARKS), {}
    for place, piece in enumerate(pieces):
        if len(piece) > LONGEST_TEXT:
            stand_in = secrets.token_hex()  # nobody can have written it into the body
            apart[stand_in], pieces[place] = piece, stand_in.encode()
    return b'"'.join(pieces), apart


def _decoded(name: str, text: object, long_texts: dict[str, bytes], limit: int) -> bytes:
    spelt = long_texts.pop(text, None) if isinstance(text, str) else None
    if spelt is not None and len(spelt) > 2 * (limit * 4 // 3 + 4):
        # Escapes may take as much as the photo; what they stand for is not looked at in vain.
        raise _too_large(name, limit)
    try:
        return decoded(json.loads(f'"{spelt.decode("ascii")}"') if spelt is not None else text)
    except NotBase64 as error:
        raise Validation(str(error), errors=(Advice(name, "base64", str(error)),)) from error
    except ValueError as error:
        message = "The text of the photo is not base64: it has characters that base64 does not use."
        raise Validation(message, errors=(Advice(name, "base64", message),)) from error
