"""Strict JSON: what a lenient parser would let in, MongoDB cannot store or two readers would read differently."""

import codecs
import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response, params
from fastapi.routing import APIRoute
from python_multipart.multipart import parse_options_header

from app.api.dependencies import Admission
from app.api.urlencoded import require_distinct, require_utf8
from app.errors import Advice, UnsupportedMediaType, Validation

#: Of objects and lists in each other; metadata, the deepest that is taken, ends at five.
DEEPEST = 16
#: Brackets, commas and quotes in one body. An account with a thousand galleries has three thousand.
MOST_MARKS = 16 * 1024
_MARKS = (b"[", b"{", b",", b'"')
#: An escape that may be half of a surrogate pair.
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class StrictRoute(APIRoute):
    """A route that lets its callers in before it looks at what they bring, and takes JSON only as `parsed` does.

    Forms are percent-encoded, in UTF-8, and name each field once.

    Routes with photos parse theirs themselves.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's handler behind these checks."""
        handle, admission = super().get_route_handler(), admission_of(self)
        takes_form = self.body_field is not None and isinstance(self.body_field.field_info, params.Form)

        async def handle_strictly(request: Request) -> Response:
            if admission is not None:
                await admission.admit(request)
            if self.body_field is not None:
                refuse_encodings(request)
            data = b"" if self.body_field is None else await request.body()
            if data and takes_form:
                if _kind_of(request) != "application/x-www-form-urlencoded":
                    raise UnsupportedMediaType("Send application/x-www-form-urlencoded.")
                require_distinct(data, "body")
            elif data:
                if not _is_json(request):
                    raise UnsupportedMediaType("Send application/json.")
                parsed("body", data)
            return await handle(request)

        return handle_strictly


def admission_of(route: APIRoute) -> Admission | None:
    """Whom the route lets in; None where it asks nobody."""
    waiting = [route.dependant]
    while waiting:
        dependant = waiting.pop()
        called: object = dependant.call
        if isinstance(called, Admission):
            return called
        waiting += dependant.dependencies
    return None


def refuse_encodings(request: Request) -> None:
    """Refuse a compressed body, for a small one may hold a mountain, and any charset but UTF-8. Raises UnsupportedMediaType.

    A form could name any codec of Python's: some take the square of the time, some bring halves of surrogate pairs in, some raise
    what no parser of forms expects.
    """
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMediaType("Send the body without a Content-Encoding.")
    _, parameters = parse_options_header(request.headers.get("content-type"))
    require_utf8(parameters.get(b"charset", b"utf-8").decode("latin-1"))


def _kind_of(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _is_json(request: Request) -> bool:
    kind = _kind_of(request)
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def parsed(name: str, data: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8, at most DEEPEST deep, without repeated keys, NaN, infinities, or halves of surrogate pairs.

    A byte order mark may come first. Raises Validation; where there are more than MOST_MARKS, before anything is parsed: each
    value costs far more than its bytes.
    """
    if sum(map(data.count, _MARKS)) > MOST_MARKS:
        message = f"At most {MOST_MARKS} brackets, commas and quotes are taken."
        raise Validation(message, errors=(Advice(name, "too-many-values", message),))
    message = "A JSON object is expected, in UTF-8."
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode()
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_refused)
        if isinstance(value, dict):
            _check_depth(value)
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Validation(message, errors=(Advice(name, "json", message),)) from error
    if not isinstance(value, dict):
        raise Validation(message, errors=(Advice(name, "json", message),))
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) != len(pairs):
        message = "a key came twice"
        raise ValueError(message)
    return named


def _check_depth(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        inner = (one for outer in level for one in (outer.values() if isinstance(outer, dict) else outer))
        level = [one for one in inner if isinstance(one, dict | list)]
        if not level:
            return
    message = f"nested deeper than {DEEPEST}"
    raise ValueError(message)


def _refused(constant: str) -> None:
    message = f"{constant} is not JSON"
    raise ValueError(message)
