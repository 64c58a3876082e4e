"""Lists: a bounded page, newest first, with an opaque cursor that is signed and bound to caller and query."""

import base64
import binascii
import hmac
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from beanie import Document, SortDirection
from beanie.odm.queries.find import FindMany
from fastapi import Query, Request
from pydantic import BaseModel

from app.audit import Action
from app.errors import Advice, Validation
from app.keys import KeyRing

SIGNATURE_BYTES = 16

T = TypeVar("T", bound=BaseModel)
D = TypeVar("D", bound=Document)
K = TypeVar("K")
P = TypeVar("P", bound=BaseModel)


class Paged(BaseModel, Generic[T]):
    """One page of a list."""

    items: list[T]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Page:
    """What a caller asked for: at most `limit` items, after `cursor`."""

    limit: Annotated[int, Query(ge=1, le=200)] = 50
    cursor: Annotated[str | None, Query(max_length=1024)] = None


def _signature(keys: KeyRing, request: Request, position: bytes) -> bytes:
    query = sorted((k, v) for k, v in request.query_params.multi_items() if k not in ("cursor", "limit"))
    action: Action = request.state.action
    bound = json.dumps([action.actor_id, request.url.path, query], separators=(",", ":")).encode()
    return keys.keyed_hash("cursor", bound + b"\0" + position)[:SIGNATURE_BYTES]


def position_of(keys: KeyRing, request: Request, page: Page, kind: Callable[[Any], K]) -> tuple[K, str] | None:
    """The sort key and id behind which the page begins; None for the first page.

    kind: reads the key from JSON. Raises Validation for a cursor of another list, caller or query.
    """
    if page.cursor is None:
        return None
    try:
        raw = base64.b64decode(page.cursor + "=" * (-len(page.cursor) % 4), altchars=b"-_", validate=True)
        signature, position = raw[:SIGNATURE_BYTES], raw[SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, _signature(keys, request, position)):
            raise ValueError  # noqa: TRY301 - a forged cursor ends like a broken one
        key, id_ = json.loads(position)
        return kind(key), str(id_)
    except (ValueError, binascii.Error) as error:
        message = "The cursor does not belong to this list."
        raise Validation(message, errors=(Advice("cursor", "bad-cursor", message),)) from error


def cursor_behind(keys: KeyRing, request: Request, key: str | float, id_: str) -> str:
    """The cursor of the page that begins behind this sort key and id."""
    position = json.dumps([key, id_], separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(_signature(keys, request, position) + position).rstrip(b"=").decode()


async def page_of(
    kind: type[D],
    filters: Mapping[str, Any],
    page: Page,
    request: Request,
    keys: KeyRing,
    *,
    by: str = "created_at",
    order: Literal["newest", "oldest"] = "newest",
) -> tuple[list[D], str | None]:
    """One page of the documents that fit, by (`by`, id), and the cursor of the next. Raises Validation for a bad cursor."""
    query = _query_of(kind, filters, page, request, keys, by=by, order=order)
    return _cut(await query.to_list(), page, request, keys, by)


async def page_of_parts(
    kind: type[D],
    part: type[T],
    filters: Mapping[str, Any],
    page: Page,
    request: Request,
    keys: KeyRing,
) -> tuple[list[T], str | None]:
    """As `page_of`, by creation time, the oldest first. Reads only the fields of `part`."""
    query = _query_of(kind, filters, page, request, keys, by="created_at", order="oldest")
    return _cut(await query.project(part).to_list(), page, request, keys, "created_at")


def _query_of(
    kind: type[D],
    filters: Mapping[str, Any],
    page: Page,
    request: Request,
    keys: KeyRing,
    *,
    by: str,
    order: Literal["newest", "oldest"],
) -> FindMany[D]:
    """The documents of the page, and one more if there is one. Raises Validation for a bad cursor."""
    direction, beyond = (SortDirection.DESCENDING, "$lt") if order == "newest" else (SortDirection.ASCENDING, "$gt")
    conditions: list[Mapping[str, Any]] = [filters] if filters else []
    position = position_of(keys, request, page, datetime.fromisoformat)
    if position is not None:
        moment, id_ = position
        conditions.append({"$or": [{by: {beyond: moment}}, {by: moment, "_id": {beyond: id_}}]})
    query = kind.find({"$and": conditions} if conditions else {})
    return query.sort([(by, direction), ("_id", direction)]).limit(page.limit + 1)


def _cut(found: list[P], page: Page, request: Request, keys: KeyRing, by: str) -> tuple[list[P], str | None]:
    """The page's items, and the cursor of the next page."""
    items = found[: page.limit]
    if len(found) <= page.limit:
        return items, None
    last = items[-1]
    return items, cursor_behind(keys, request, getattr(last, by).isoformat(), str(getattr(last, "id")))  # noqa: B009
