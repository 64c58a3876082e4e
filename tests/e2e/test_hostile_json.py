"""Hostile requests: never a fault of ours, never a trace of the inside, never a change."""

import gzip
import json
import time

import httpx
import pytest

from tests.e2e.builders import (
    NOBODY,
    Page,
    Service,
    again,
    base64_of,
    enrol,
    identity,
    part,
    people,
    problem,
    unique,
)

REFUSED_WITHIN_SECONDS = 2.0
SURROGATE = '"\\ud800"'
NUL = '"a\\u0000b"'


@pytest.fixture(scope="module")
def made(service: Service) -> Page:
    """Somebody who must stay as they are."""
    return enrol(service, "default", people()[5].photo, external_ref=unique("hostile"))


def raw(
    caller: httpx.Client, method: str, path: str, body: str | bytes, kind: str = "application/json"
) -> httpx.Response:
    """A request with these very bytes; answered in time, and by no fault of ours."""
    began = time.monotonic()
    answer = caller.request(method, path, content=body, headers={"Content-Type": kind})
    assert time.monotonic() - began < REFUSED_WITHIN_SECONDS
    assert answer.status_code < 500, answer.text
    for inside in ("Traceback", "/app/", "site-packages", "pymongo", "mongodb://", "Error:"):
        assert inside not in answer.text
    return answer


def refused(caller: httpx.Client, method: str, path: str, body: str | bytes) -> None:
    """422, and not because the path is wrong."""
    problem(raw(caller, method, path, body), 422, "validation")


def with_photo(**fields: str) -> str:
    """A JSON body with a photo and raw JSON values."""
    rest = "".join(f", {json.dumps(name)}: {value}" for name, value in fields.items())
    return f'{{"photo_base64": "{base64_of(people()[1].photo)}"{rest}}}'


@pytest.mark.parametrize("value", [SURROGATE, '{"$gt": ""}', '{"$ne": null}', '["a"]', "true", "1", '{"$where": "1"}'])
def test_h30_h36_text_is_text(service: Service, made: Page, value: str) -> None:
    for field in ("external_ref", "full_name", "gallery", "date_of_birth"):
        refused(service.officer, "POST", "/v1/identities", with_photo(**{field: value}))
    for field in ("external_ref", "identity_id", "nonce", "audience", "gallery"):
        fields = {"identity_id": f'"{made["id"]}"'} | {field: value}
        refused(service.app, "POST", "/v1/verifications", with_photo(**fields))
    refused(service.app, "POST", "/v1/identifications", with_photo(gallery=value))
    refused(service.officer, "PATCH", f"/v1/identities/{made['id']}", f'{{"full_name": {value}}}')
    refused(service.officer, "POST", f"/v1/identities/{made['id']}/revoke", f'{{"reason": {value}}}')
    decision = f'{{"decision": "distinct", "reason": {value}}}'
    refused(service.officer, "POST", f"/v1/dedup/cases/{NOBODY}/decision", decision)
    for field in ("username", "password", "roles"):
        body = {"username": '"hostile"', "password": '"a long password"', "roles": '["officer"]'} | {field: value}
        refused(service.admin, "POST", "/v1/users", "{" + ", ".join(f'"{k}": {v}' for k, v in body.items()) + "}")
    refused(service.admin, "POST", "/v1/galleries", f'{{"name": {value}}}')
    refused(service.admin, "POST", "/v1/galleries", f'{{"name": "hostile", "pack": {value}}}')
    refused(service.officer, "POST", "/v1/auth/password", f'{{"current_password": {value}, "new_password": {value}}}')
    assert identity(service, made["id"]) == made


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000])
def test_h29_h34_numbers_are_finite(service: Service, made: Page, number: str) -> None:
    for policy in ("verify_fmr", "verify_threshold", "retention_days", "second_face_prominence"):
        body = f'{{"name": "{unique("nan")}", "policy": {{"{policy}": {number}}}}}'
        refused(service.admin, "POST", "/v1/galleries", body)
        refused(service.admin, "PATCH", "/v1/galleries/default", f'{{"policy": {{"{policy}": {number}}}}}')
    refused(service.app, "POST", "/v1/identifications", with_photo(limit=number))
    refused(service.officer, "PATCH", f"/v1/identities/{made['id']}", f'{{"metadata": {{"a": {number}}}}}')
    refused(service.officer, "POST", "/v1/identities", with_photo(metadata=f'{{"a": {number}}}'))
    assert identity(service, made["id"]) == made


@pytest.mark.parametrize(
    "body",
    ["", "null", "[]", "1", '"x"', "{", "{}}", "{'a': 1}", "\ufeff{}", b"\xff\xfe{\x00}\x00", b'{"reason": "\xed\xa0\x80"}',
     '{"reason": "a", "reason": "b"}', '{"reason": "a", "force": true}', '{"reason": "a", "$set": {"status": "active"}}',
     '{"reason": "a", "\\ud800": 1}', "[" * 50_000, '{"reason":' * 20_000],
)  # fmt: skip
def test_h33_h34_h35_a_body_is_one_json_object_of_known_fields(service: Service, made: Page, body: str | bytes) -> None:
    refused(service.officer, "POST", f"/v1/identities/{made['id']}/revoke", body)
    assert identity(service, made["id"]) == made


@pytest.mark.parametrize("field", ["role", "is_active", "status", "id", "version", "dedup", "created_at", "$set"])
def test_h35_nobody_assigns_what_is_not_theirs(service: Service, made: Page, field: str) -> None:
    refused(service.officer, "PATCH", f"/v1/identities/{made['id']}", json.dumps({field: "active"}))
    refused(service.officer, "POST", "/v1/identities", with_photo(**{field: '"active"'}))
    user = {"username": unique("u"), "password": "a long password", "roles": ["officer"], field: "active"}
    refused(service.admin, "POST", "/v1/users", json.dumps(user))
    assert identity(service, made["id"]) == made


@pytest.mark.parametrize(
    "metadata",
    ['{"$where": "1"}', '{"a": {"$gt": ""}}', '{"a.b": 1}', '{"a": {"b": {"c": {"d": 1}}}}', '{"a": [[[[1]]]]}',
     json.dumps({"a": "x" * 5000}), json.dumps({f"k{n}": n for n in range(33)}), '"text"', "[1]", '{"a": "\\ud800"}',
     '{"a": 1, "a": 2}'],
)  # fmt: skip
def test_h37_metadata_is_small_flat_and_without_operators(service: Service, made: Page, metadata: str) -> None:
    refused(service.officer, "PATCH", f"/v1/identities/{made['id']}", f'{{"metadata": {metadata}}}')
    refused(service.officer, "POST", "/v1/identities", with_photo(metadata=metadata))
    form = {"files": [part(people()[1].photo)], "data": {"metadata": metadata}}
    problem(service.officer.post("/v1/identities", **form), 422, "validation")
    assert identity(service, made["id"]) == made


@pytest.mark.parametrize(
    "query",
    ["limit=-1", "limit=0", "limit=201", "limit=1000000000", "limit=x", "limit=1e3", "limit=", "cursor=x", "cursor=%00",
     "cursor=" + "A" * 2000, "skip=1000000000000", "sort=password_hash", "filter[$regex]=(a%2b)%2b$", "gallery[$ne]=x",
     "limit=1&cursor=eyJhIjoxfQ"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/identities", "/v1/galleries", "/v1/dedup/cases"])
def test_h38_h39_h40_a_list_takes_its_own_parameters_only(service: Service, path: str, query: str) -> None:
    problem(service.officer.get(f"{path}?{query}"), 422, "validation")


@pytest.mark.parametrize(
    "query", ["limit=-1", "cursor=x", "sort=time", "action[$ne]=x", "after=%00", "actor=" + "a" * 129]
)
def test_h38_h39_h40_the_log_and_the_accounts_take_their_own_parameters_only(service: Service, query: str) -> None:
    problem(service.auditor.get(f"/v1/audit/events?{query}"), 422, "validation")
    problem(service.admin.get(f"/v1/users?{query}"), 422, "validation")


@pytest.mark.parametrize(
    "text", ["%00", "%F0%9F%92%A9", "%ff%fe", "$where", "a'%20or%20'1'='1", "..%2f..%2fetc", "x" * 1000]
)
def test_h31_h43_an_odd_id_is_nobody(service: Service, text: str) -> None:
    for path in ("/v1/identities/{}", "/v1/dedup/jobs/{}", "/v1/dedup/cases/{}", "/v1/galleries/{}"):
        problem(service.officer.get(path.format(text)), 404, "not-found")
    problem(service.auditor.get(f"/v1/audit/events/{text}"), 404, "not-found")
    problem(service.admin.get(f"/v1/users/{text}"), 404, "not-found")


def test_h43_no_call_is_reached_by_a_second_spelling(service: Service, made: Page) -> None:
    path = f"/v1/identities/{made['id']}"
    for other in (
        "/v1/identities/",
        "//v1/identities",
        f"{path}/",
        "/V1/identities",
        "/v1/%2e%2e/v1/identities",
        "/v1/identities%00",
        "/v1/identities%2f",
        "/v1/identities%0a",
        "/v1//identities",
        "/v1/identities;a=b",
        "/v1",
    ):
        answer = service.officer.send(
            service.officer.build_request("GET", httpx.URL(service.url, raw_path=other.encode()))
        )
        problem(answer, 404, "not-found")
    override = {"X-HTTP-Method-Override": "DELETE", "X-Method-Override": "DELETE", "X-HTTP-Method": "DELETE"}
    problem(service.officer.post(path, headers=override), 405, "method-not-allowed")
    assert service.officer.get(f"{path}", headers=override).json() == made
    for method in ("TRACE", "PUT", "BREW", "CONNECT", "PROPFIND"):
        refusal = service.officer.request(method, "/v1/identities")
        problem(refusal, 405, "method-not-allowed")
        assert refusal.headers["allow"] == "GET, POST"
    assert service.officer.put(path).headers["allow"] == "DELETE, GET, PATCH"


def test_h20_h34_a_body_is_bounded_while_it_is_read(service: Service, made: Page) -> None:
    long = '{"full_name": "' + "a" * 20_000_000 + '"}'
    path = f"/v1/identities/{made['id']}"
    problem(raw(service.officer, "PATCH", path, long), 413, "too-large")
    huge = again(people()[1].photo) + b"\0" * 60_000_000
    problem(service.app.post("/v1/faces/detect", files=[part(huge)]), 413, "too-large")
    assert identity(service, made["id"]) == made


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", "application/x-www-form-urlencoded", "x"])
def test_a_body_of_another_kind_is_not_taken(service: Service, made: Page, kind: str) -> None:
    path = f"/v1/identities/{made['id']}/revoke"
    problem(raw(service.officer, "POST", path, '{"reason": "x"}', kind), 415, "unsupported-media-type")
    problem(raw(service.app, "POST", "/v1/faces/detect", "x", kind), 415, "unsupported-media-type")


def test_h18_a_packed_body_is_not_unpacked(service: Service, made: Page) -> None:
    packed = gzip.compress(b'{"reason": "x"}')
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    path = f"/v1/identities/{made['id']}/revoke"
    problem(service.officer.post(path, content=packed, headers=headers), 415, "unsupported-media-type")
    packed_form = service.app.post(
        "/v1/faces/detect", files=[part(people()[1].photo)], headers={"Content-Encoding": "gzip"}
    )
    problem(packed_form, 415, "unsupported-media-type")


def test_h06_h23_a_broken_form_is_refused(service: Service) -> None:
    photo = part(people()[1].photo)
    broken = [
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 422),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=a"}}, 422),
        ({"content": b"", "headers": {"Content-Type": "multipart/form-data; boundary=a"}}, 422),
        ({"files": [photo], "data": {f"f{n}": "x" for n in range(100)}}, 422),
        ({"files": [photo] * 50}, 422),
        ({"files": [part(b"x")] * 1500}, 422),
        ({"files": [photo], "data": {f"f{n}": "" for n in range(10_000)}}, 422),
        ({"files": [photo, photo]}, 422),
        ({"files": [photo, part(b"x", "other")]}, 422),
        ({"files": [photo], "data": {"a" * 1_000_000: "x"}}, 422),
        ({"files": {"photo": ("n" * 1_000_000, b"x")}}, 422),
        ({"data": {"photo": "text"}, "files": [part(b"x", "other")]}, 422),
    ]
    for request, status in broken:
        began = time.monotonic()
        answer = service.app.post("/v1/faces/detect", **request)
        problem(answer, status, "validation")
        assert time.monotonic() - began < REFUSED_WITHIN_SECONDS


@pytest.mark.parametrize(
    "charset",
    ["utf-16", "unicode_escape", "raw_unicode_escape", "utf-7", "rot13", "no-such", "idna", "punycode", "undefined"],
)
def test_h30_a_form_s_charset_brings_nothing_in(service: Service, charset: str) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="gallery"\r\n\r\n\\ud800+2AA-\r\n'
    body += b'--b\r\nContent-Disposition: form-data; name="photo"; filename="a"\r\n\r\n'
    body += people()[1].photo + b"\r\n--b--\r\n"
    kind = f"multipart/form-data; boundary=b; charset={charset}"
    problem(raw(service.officer, "POST", "/v1/identities", body, kind), 415, "unsupported-media-type")
    login = b'--b\r\nContent-Disposition: form-data; name="grant_type"\r\n\r\npassword\r\n'
    login += b'--b\r\nContent-Disposition: form-data; name="username"\r\n\r\n\\ud800+2AA-\r\n'
    login += b'--b\r\nContent-Disposition: form-data; name="password"\r\n\r\n\\ud800+2AA-\r\n--b--\r\n'
    problem(raw(service.anonymous, "POST", "/v1/auth/token", login, kind), 415, "unsupported-media-type")


@pytest.mark.parametrize("text", ["data:image/jpeg,/9j/", "/9j*", "/9j=/", "/", "/9j/===", "é", "", "\n"])
def test_photos_in_json_are_base64(service: Service, text: str) -> None:
    problem(service.app.post("/v1/faces/detect", json={"photo_base64": text}), 422, "validation")


@pytest.mark.parametrize("text", ["/9j/", "data:image/jpeg;base64,/9j/", "_9j_", "/9j/\r\n ", "/9j/4A", "/9j/4A=="])
def test_base64_is_read_in_every_spelling(service: Service, text: str) -> None:
    """They are the beginning of a JPEG, so it is the photo that is refused."""
    problem(service.app.post("/v1/faces/detect", json={"photo_base64": text}), 422, "undecodable-image")


def test_a_photo_is_not_named_twice(service: Service) -> None:
    body = json.loads(with_photo())
    for odd in ({**body, "photos_base64": "x"}, {**body, "photo": "x"}, {"photos_base64": []}, {"photos_base64": [1]}):
        problem(service.officer.post("/v1/identities", json=odd), 422, "validation")


@pytest.mark.parametrize(
    "token",
    ["", "x", "a.b.c", "..", "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9.", "a" * 9000, "null", "[object Object]", "a b"],
)
def test_a_token_that_is_none_lets_nobody_in(service: Service, token: str) -> None:
    for header in (f"Bearer {token}", f"bearer {token}", token, f"Basic {token}"):
        answer = service.anonymous.get("/v1/users", headers={"Authorization": header.strip()})
        problem(answer, 401, "unauthenticated")
        assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize("name", ["a b", "é", "x" * 129, "a/b", "<script>", ""])
def test_only_a_plain_request_id_is_taken_over(service: Service, name: str) -> None:
    answer = service.anonymous.get("/health", headers={"X-Request-ID": name.encode()})
    assert answer.headers["x-request-id"] not in ("", name)
    assert service.anonymous.get("/health", headers={"X-Request-ID": "a-B.9_"}).headers["x-request-id"] == "a-B.9_"


@pytest.mark.parametrize("q", ["(a+)+$", ".*", "^", "$where", "a" * 256, "\\", "a\u0000b", "' or 1=1"])
def test_h38_a_search_by_name_is_no_pattern(service: Service, made: Page, q: str) -> None:
    began = time.monotonic()
    answer = service.officer.get("/v1/identities", params={"q": q, "gallery": "default"})
    assert time.monotonic() - began < REFUSED_WITHIN_SECONDS
    assert answer.status_code == 422 or answer.json()["items"] == [], answer.text


def test_h39_a_cursor_is_its_own_callers_and_querys(service: Service) -> None:
    for _ in range(2):
        made = service.admin.post("/v1/galleries", json={"name": unique("cursor")})
        assert made.status_code == 201, made.text
    cursor = service.admin.get("/v1/galleries", params={"limit": 1}).json()["next_cursor"]
    assert service.admin.get("/v1/galleries", params={"cursor": cursor}).status_code == 200
    problem(service.officer.get("/v1/galleries", params={"cursor": cursor}), 422, "validation")
    problem(service.admin.get("/v1/users", params={"cursor": cursor}), 422, "validation")
    other = "C" if cursor[10] == "B" else "B"
    tail = "AAAA" if cursor[-4:] != "AAAA" else "BBBB"
    for forged in (cursor[:-4] + tail, cursor[:10] + other + cursor[11:], cursor + "AAAA", cursor[: len(cursor) // 2]):
        problem(service.admin.get("/v1/galleries", params={"cursor": forged}), 422, "validation")


def test_h32_two_spellings_of_one_name_are_one(service: Service, gallery: str) -> None:
    name = unique("alice")
    enrol(service, gallery, people()[4].photo, external_ref=f"Ａ{name}")
    for other in (f"a{name}", f"A{name.upper()}", f"ａ{name}"):
        refusal = service.officer.post(
            "/v1/identities", files=[part(people()[3].photo)], data={"gallery": gallery, "external_ref": other}
        )
        problem(refusal, 409, "external-ref-taken")
    user = {"password": "a long password", "roles": ["officer"]}
    assert service.admin.post("/v1/users", json={"username": f"Ｂ{name}", **user}).status_code == 201
    problem(service.admin.post("/v1/users", json={"username": f"b{name}", **user}), 409, "conflict")


def test_h107_a_photo_is_kept_by_nobody_on_the_way_and_given_whole(service: Service, made: Page) -> None:
    path = f"/v1/identities/{made['id']}/samples/{made['samples'][0]['id']}/photo"
    plain = service.officer.get(path)
    asked = {"Range": "bytes=0-9", "If-None-Match": "*", "If-Modified-Since": "Fri, 01 Jan 2100 00:00:00 GMT"}
    again_asked = service.officer.get(path, headers=asked)
    for answer in (plain, again_asked):
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-disposition"].startswith("attachment")
        assert answer.headers["content-type"] == "image/jpeg"
        assert "etag" not in answer.headers
        assert "accept-ranges" not in answer.headers
    assert again_asked.content == plain.content
    problem(service.anonymous.get(path), 401, "unauthenticated")


def test_h108_what_is_open_to_all_names_no_address_and_no_path(service: Service) -> None:
    for path in ("/ready", "/health"):
        text = service.anonymous.get(path).text
        for inside in ("127.0.0.1", "localhost", "://", "/tmp", "/data", ".sock"):  # noqa: S108 - looked for
            assert inside not in text, path
    parts = service.anonymous.get("/ready").json()["checks"]
    assert {"model", "mongo", "queue", "photos", "index"} <= set(parts)


def test_a_stranger_with_a_broken_body_is_told_first_that_nobody_knows_them(service: Service) -> None:
    for path in ("/v1/users", "/v1/identities", "/v1/galleries", "/v1/dedup/scans"):
        problem(raw(service.anonymous, "POST", path, "{"), 401, "unauthenticated")


def test_every_answer_carries_its_headers(service: Service, made: Page) -> None:
    for answer in (
        service.anonymous.get("/health"),
        service.anonymous.get("/nowhere"),
        service.anonymous.get("/v1/users"),
        service.officer.get(f"/v1/identities/{made['id']}"),
        service.officer.put("/v1/identities"),
    ):
        assert answer.headers["x-request-id"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in answer.headers


def test_h106_a_foreign_page_is_given_nothing(service: Service) -> None:
    for origin in ("https://evil.example", "null"):
        asked = {"Origin": origin, "Access-Control-Request-Method": "DELETE"}
        answer = service.anonymous.options("/v1/identities", headers=asked)
        assert "access-control-allow-origin" not in answer.headers
        assert not answer.is_success


@pytest.mark.parametrize("value", [NUL, '"\\u202eevil"', '"a\\u0007"', '"\\u3164"'])
def test_h31_names_hold_visible_characters_only(service: Service, made: Page, value: str) -> None:
    path = f"/v1/identities/{made['id']}"
    for field in ("full_name", "external_ref"):
        refused(service.officer, "PATCH", path, f'{{"{field}": {value}}}')
    refused(service.admin, "POST", "/v1/users", f'{{"username": {value}, "password": "a long password", "roles": []}}')
    refused(service.admin, "POST", "/v1/clients", f'{{"name": {value}}}')
    assert identity(service, made["id"]) == made


def test_the_next_honest_request_is_served(service: Service, made: Page) -> None:
    assert identity(service, made["id"]) == made
    assert service.anonymous.get("/ready").json()["status"] == "ready"
