"""Users, clients and their tokens over HTTP, on a real MongoDB."""

import asyncio
import json
import time
import uuid
from dataclasses import replace
from datetime import datetime, timedelta

import jwt
import pytest

from app.access import callers
from app.access.callers import Access, new_secret
from app.access.tokens import TokenClaims
from app.audit import by_system
from app.documents.accounts import Client, Login, RefreshToken, RevokedToken, User
from app.documents.base import now
from app.documents.claims import Once
from app.documents.events import AuditEvent, StrangerCount
from app.domain.callers import Caller, Role
from app.errors import Unauthenticated
from app.limits import RateLimits
from app.use_cases.keep_clients import ClientFields, ensure_client
from app.use_cases.keep_users import UserFields, delete_user, ensure_admin, ensure_user
from tests.support.accounts import ADMIN, HERE, PASSWORD, AccountService, basic, bearer

Json = dict[str, object]


async def test_a_login_brings_tokens_that_the_published_keys_prove(service: AccountService) -> None:
    answer = await service.token(grant_type="password", username="ROOT", password=PASSWORD)
    body = answer.json()
    assert answer.headers["cache-control"] == "no-store"
    assert (body["token_type"], body["expires_in"], body["scope"]) == ("bearer", 1800, "admin")
    assert set(body) == {"access_token", "token_type", "expires_in", "refresh_token", "scope"}
    keys = (await service.http.get("/.well-known/jwks.json")).json()
    header = jwt.get_unverified_header(body["access_token"])
    assert (header["typ"], header["alg"]) == ("at+jwt", "EdDSA")
    key = jwt.PyJWKSet.from_dict(keys)[header["kid"]]
    claims = jwt.decode(body["access_token"], key, algorithms=["EdDSA"], audience="idem-api")
    me = (await service.http.get("/v1/auth/me", headers=bearer(body["access_token"]))).json()
    assert me == {"id": claims["sub"], "kind": "user", "name": ADMIN, "roles": ["admin"], "galleries": None}


async def test_a_wrong_password_and_an_unknown_user_get_one_answer_and_two_events(service: AccountService) -> None:
    wrong = await service.token(grant_type="password", username=ADMIN, password="wrong horse")
    unknown = await service.token(grant_type="password", username="my secret pass phrase", password=PASSWORD)
    assert wrong.status_code == unknown.status_code == 400
    assert wrong.json() == unknown.json()
    assert wrong.json()["error"] == "invalid_grant"
    first, second = await service.events("auth.login")
    assert (first.outcome, first.actor.kind, first.detail) == ("denied", "user", {"reason": "wrong_password"})
    assert (second.outcome, second.actor.kind, second.actor.id) == ("denied", "anonymous", None)
    assert second.personal is not None
    assert (second.personal.actor_name, second.personal.actor_ip) == (None, "192.0.2.7")


async def test_refresh_tokens_that_nobody_was_given_are_an_event_a_minute_and_counted(service: AccountService) -> None:
    for number in range(4):
        assert (await service.refresh(f"guess {number}")).json()["error"] == "invalid_grant"
    events = await service.events("auth.refresh")
    # One more where a minute ended in between.
    assert 1 <= len(events) <= 2
    assert (events[0].outcome, events[0].actor.kind, events[0].detail) == (
        "denied", "anonymous", {"reason": "unknown_token"},
    )  # fmt: skip
    counts = await StrangerCount.find_all().to_list()
    assert (sum(one.refused for one in counts), {one.ip for one in counts}) == (4, {HERE})


async def test_a_refresh_token_whose_login_is_gone_is_as_unknown_as_a_guessed_one(service: AccountService) -> None:
    tokens = await service.log_in()
    await Login.find_all().delete()
    assert (await service.refresh(tokens.refresh)).status_code == 400
    assert [event.detail for event in await service.events("auth.refresh")] == [{"reason": "unknown_token"}]


async def test_logins_over_the_rate_are_an_event_a_minute_whatever_they_bring(
    service: AccountService, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = service.runtime
    # Without Redis a process grants a tenth.
    few = RateLimits(
        runtime.settings.model_copy(update={"rate_login": "10/hour", "rate_write": "1/hour"}), runtime.keys
    )
    monkeypatch.setattr(runtime, "limits", few)
    assert (await service.token(grant_type="nothing")).status_code == 400
    for path, action in (("token", "auth.login"), ("revoke", "auth.revoke")):
        answers = [await service.http.post(f"/v1/auth/{path}", data={"token": "x"}) for _ in range(4)]
        assert answers[-1].status_code == 429
        await Once.find_all().delete()  # the next one is another minute's
        events = await service.events(action)
        assert [(event.outcome, event.actor.kind, event.detail["problem"]) for event in events] == [
            ("failure", "anonymous", "rate-limited")
        ]


async def test_addresses_of_one_subscriber_are_one_stranger(service: AccountService) -> None:
    for host in ("1", "ffff:1:2:3", "abcd::"):
        async with service.at(f"2001:db8:0:7:{host}".replace("7:1", "7::1")) as at_host:
            assert (await at_host.refresh("a guess")).status_code == 400
            assert (await at_host.http.get("/v1/auth/me")).status_code == 401
    events = await AuditEvent.find({"actor.kind": "anonymous"}).to_list()
    assert 1 <= len(events) <= 2
    counts = await StrangerCount.find_all().to_list()
    assert {one.ip for one in counts} == {"2001:db8:0:7::/64"}
    assert sum(one.refused for one in counts) == 6


async def test_a_token_request_that_cannot_be_granted_gets_oauths_error(service: AccountService) -> None:
    long = "x" * 100_000
    cases: list[tuple[dict[str, str], str]] = [
        ({}, "invalid_request"),
        ({"grant_type": "implicit"}, "unsupported_grant_type"),
        ({"grant_type": "password", "username": ADMIN}, "invalid_request"),
        ({"grant_type": "password", "username": "\0", "password": "\0" * 9}, "invalid_grant"),
        ({"grant_type": "password", "username": long, "password": long}, "invalid_grant"),
        ({"grant_type": "refresh_token"}, "invalid_request"),
        ({"grant_type": "refresh_token", "refresh_token": "guessed"}, "invalid_grant"),
        ({"grant_type": "client_credentials"}, "invalid_request"),
        ({"grant_type": "client_credentials", "client_id": "x", "client_secret": "y"}, "invalid_client"),
    ]
    for form, error in cases:
        answer = await service.token(**form)
        assert (answer.status_code, answer.json()["error"]) == (400, error), form
        assert answer.headers["cache-control"] == "no-store"


async def test_h54_a_refresh_token_is_good_once_and_its_second_use_ends_the_login(service: AccountService) -> None:
    first = await service.log_in()
    renewed = (await service.refresh(first.refresh)).json()
    assert await service.holds(renewed["access_token"])
    assert await service.holds(first.access)
    assert (await service.refresh(first.refresh)).json()["error"] == "invalid_grant"
    assert (await service.refresh(renewed["refresh_token"])).json()["error"] == "invalid_grant"
    assert not await service.holds(renewed["access_token"])
    assert not await service.holds(first.access)
    outcomes = [(event.outcome, event.detail.get("reason")) for event in await service.events("auth.refresh")]
    assert outcomes == [("success", None), ("denied", "refresh_reuse"), ("denied", "revoked")]


async def test_h54_of_two_uses_at_the_same_moment_one_wins_and_the_login_ends(service: AccountService) -> None:
    for _ in range(5):
        tokens = await service.log_in()
        answers = await asyncio.gather(service.refresh(tokens.refresh), service.refresh(tokens.refresh))
        assert sorted(answer.status_code for answer in answers) == [200, 400]
        winner = next(answer.json() for answer in answers if answer.status_code == 200)
        assert (await service.refresh(winner["refresh_token"])).status_code == 400
        assert not await service.holds(winner["access_token"])


async def test_a_refresh_token_left_alone_expires_and_no_login_lasts_for_ever(service: AccountService) -> None:
    tokens = await service.log_in()
    login, stored = await Login.find_one({}), await RefreshToken.find_one({})
    assert login is not None
    assert stored is not None
    settings = service.runtime.settings
    assert login.ends_at - login.created_at == timedelta(hours=settings.refresh_token_absolute_hours)
    assert stored.expires_at - login.created_at == timedelta(hours=settings.refresh_token_sliding_hours)

    # An hour before its end, a login gives tokens for that hour only.
    await login.set({"ends_at": now() + timedelta(hours=1)})
    renewed = (await service.refresh(tokens.refresh)).json()["refresh_token"]
    last = await RefreshToken.find_one({"used_at": None})
    ending = await Login.find_one({})
    assert last is not None
    assert ending is not None
    assert last.expires_at == ending.ends_at

    await last.set({"expires_at": now()})
    assert (await service.refresh(renewed)).status_code == 400


async def test_h51_neither_token_serves_as_the_other(service: AccountService) -> None:
    tokens = await service.log_in()
    assert not await service.holds(tokens.refresh)
    assert (await service.refresh(tokens.access)).status_code == 400


@pytest.mark.parametrize("which", ["access", "refresh"])
async def test_h55_logging_out_with_either_token_ends_both_at_once(service: AccountService, which: str) -> None:
    tokens, other = await service.log_in(), await service.log_in()
    assert await service.holds(tokens.access)
    for _ in range(2):
        answer = await service.http.post("/v1/auth/revoke", data={"token": getattr(tokens, which)})
        assert answer.status_code == 200
    assert not await service.holds(tokens.access)
    assert (await service.refresh(tokens.refresh)).status_code == 400
    assert await service.holds(other.access)
    (event,) = await service.events("auth.revoke")
    assert (event.outcome, event.actor.kind, event.subject.kind) == ("success", "user", "login")


async def test_revoking_what_is_no_token_is_no_error(service: AccountService) -> None:
    for form in ({}, {"token": ""}, {"token": "x"}, {"token": "a.b.c"}, {"token": "x" * 100_000}):
        assert (await service.http.post("/v1/auth/revoke", data=form)).status_code == 200
    assert await service.events("auth.revoke") == []


async def test_a_client_logs_in_by_basic_or_form_and_gets_no_refresh_token(service: AccountService) -> None:
    await service.gallery("north")
    client, by_id = await service.client(galleries=("north",))
    secret, form = by_id["client_secret"], {"grant_type": "client_credentials"}
    by_basic = await service.http.post("/v1/auth/token", data=form, headers=basic(client.id, secret))
    by_form = await service.token(**form, client_id=client.id, client_secret=secret)
    assert by_basic.status_code == by_form.status_code == 200
    assert by_form.json()["refresh_token"] is None
    me = await service.http.get("/v1/auth/me", headers=bearer(by_basic.json()["access_token"]))
    assert me.json() == {
        "id": client.id,
        "kind": "client",
        "name": "kiosk",
        "roles": ["relying_app"],
        "galleries": ["north"],
    }
    caller = await service.runtime.access.authenticate(by_form.json()["access_token"])
    assert caller.audiences == (client.id, "kiosk.example")

    twice = await service.http.post(
        "/v1/auth/token", data=form | {"client_secret": secret}, headers=basic(client.id, secret)
    )
    assert twice.json()["error"] == "invalid_request"
    wrong = await service.http.post("/v1/auth/token", data=form, headers=basic(client.id, secret[:-1] + "!"))
    assert (wrong.status_code, wrong.json()["error"]) == (400, "invalid_client")
    for value in (b"Basic", b"Basic *", b"Basic \xff", b"Basic /w==", b"Basic eA=="):
        unreadable = await service.http.post("/v1/auth/token", data=form, headers={b"Authorization": value})
        assert (unreadable.status_code, unreadable.json()["error"]) == (400, "invalid_request"), value


async def test_a_clients_token_can_be_revoked_by_itself(service: AccountService) -> None:
    _, form = await service.client()
    one, other = [(await service.token(**form)).json()["access_token"] for _ in range(2)]
    assert await service.holds(one)
    answers = await asyncio.gather(*(service.http.post("/v1/auth/revoke", data={"token": one}) for _ in range(3)))
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert not await service.holds(one)
    assert await service.holds(other)
    assert await RevokedToken.count() == len(await service.events("auth.revoke")) == 1


async def test_a_rotated_secret_and_the_former_one_hold_side_by_side_until_the_overlap_ends(
    service: AccountService,
) -> None:
    admin = bearer((await service.log_in()).access)
    made = await service.http.post("/v1/clients", json={"name": "kiosk", "galleries": None}, headers=admin)
    assert made.status_code == 201
    client = made.json()
    assert made.headers["location"] == f"/v1/clients/{client['id']}"
    assert set(client) == {
        "id", "client_id", "name", "roles", "galleries", "audiences", "created_at", "updated_at", "client_secret",
    }  # fmt: skip
    form = {"grant_type": "client_credentials", "client_id": client["client_id"]}
    path = f"/v1/clients/{client['id']}"
    old = (await service.token(**form, client_secret=client["client_secret"])).json()["access_token"]
    began = now()
    rotated = await service.http.post(f"{path}/rotate", headers=admin)
    assert rotated.status_code == 200
    until = datetime.fromisoformat(rotated.json()["former_secret_until"])
    assert timedelta(hours=24) <= until - began < timedelta(hours=24, minutes=1)
    for secret in (client["client_secret"], rotated.json()["client_secret"]):
        assert (await service.token(**form, client_secret=secret)).status_code == 200
    assert await service.holds(old)
    assert "client_secret" not in (await service.http.get(path, headers=admin)).json()

    await Client.get_pymongo_collection().update_one({"_id": client["id"]}, {"$set": {"former_until": now()}})
    assert (await service.token(**form, client_secret=client["client_secret"])).status_code == 400
    assert (await service.token(**form, client_secret=rotated.json()["client_secret"])).status_code == 200


async def test_a_second_rotation_leaves_the_newest_two_secrets(service: AccountService) -> None:
    admin = bearer((await service.log_in()).access)
    client, form = await service.client()
    secrets = [form["client_secret"]]
    for hours in (1, 720):
        body = {"overlap_hours": hours}
        answer = await service.http.post(f"/v1/clients/{client.id}/rotate", json=body, headers=admin)
        secrets.append(answer.json()["client_secret"])
    statuses = [(await service.token(**form | {"client_secret": secret})).status_code for secret in secrets]
    assert statuses == [400, 200, 200]


async def test_a_rotation_without_overlap_ends_the_old_secret_and_its_tokens_at_once(service: AccountService) -> None:
    admin = bearer((await service.log_in()).access)
    client, form = await service.client()
    await service.http.post(f"/v1/clients/{client.id}/rotate", headers=admin)
    old = (await service.token(**form)).json()["access_token"]
    assert await service.holds(old)
    answer = await service.http.post(f"/v1/clients/{client.id}/rotate", json={"overlap_hours": 0}, headers=admin)
    assert answer.json()["former_secret_until"] is None
    assert not await service.holds(old)
    assert (await service.token(**form)).status_code == 400
    new = form | {"client_secret": answer.json()["client_secret"]}
    assert (await service.token(**new)).status_code == 200
    assert [event.detail["overlap_hours"] for event in await service.events("client.rotate")] == [24, 0]
    for bad in ({"overlap_hours": -1}, {"overlap_hours": 721}, {"overlap": 1}, {"overlap_hours": "x"}):
        refused = await service.http.post(f"/v1/clients/{client.id}/rotate", json=bad, headers=admin)
        assert refused.status_code == 422, bad


async def test_a_new_password_ends_all_other_logins_and_keeps_this_one(service: AccountService) -> None:
    mine, other = await service.log_in(), await service.log_in()
    change = {"current_password": PASSWORD, "new_password": "an even better horse"}
    wrong = await service.http.post(
        "/v1/auth/password", json=change | {"current_password": "wrong horse"}, headers=bearer(mine.access)
    )
    short = await service.http.post(
        "/v1/auth/password", json=change | {"new_password": "short"}, headers=bearer(mine.access)
    )
    assert (wrong.status_code, short.status_code) == (403, 422)
    assert (await service.http.post("/v1/auth/password", json=change, headers=bearer(mine.access))).status_code == 204
    assert await service.holds(mine.access)
    assert not await service.holds(other.access)
    assert (await service.refresh(other.refresh)).status_code == 400
    assert (await service.refresh(mine.refresh)).status_code == 200
    assert (await service.token(grant_type="password", username=ADMIN, password=PASSWORD)).status_code == 400
    assert await service.log_in(ADMIN, "an even better horse")
    assert [event.outcome for event in await service.events("auth.password")] == ["denied", "failure", "success"]


@pytest.mark.parametrize(
    "change", [{"roles": ["auditor"]}, {"disabled": True}, {"password": "another horse"}, None], ids=str
)
async def test_h53_a_changed_user_is_refused_within_a_second_on_every_process(
    service: AccountService, change: Json | None
) -> None:
    user = await service.user("ann")
    elsewhere = Access(service.runtime.settings, service.runtime.keys)
    admin, tokens = bearer((await service.log_in()).access), await service.log_in("ann")
    assert (await elsewhere.authenticate(tokens.access)).id == user.id
    path = f"/v1/users/{user.id}"
    answer = await (
        service.http.delete(path, headers=admin)
        if change is None
        else service.http.patch(path, json=change, headers=admin)
    )
    answered = time.monotonic()
    assert answer.status_code == (204 if change is None else 200)
    assert not await service.holds(tokens.access)
    with pytest.raises(Unauthenticated):
        while True:
            await elsewhere.authenticate(tokens.access)
            await asyncio.sleep(0.02)
    assert time.monotonic() - answered < 1
    renewed = await service.refresh(tokens.refresh)
    if change == {"roles": ["auditor"]}:
        assert renewed.json()["scope"] == "auditor"
    else:
        assert renewed.status_code == 400


async def test_h53_other_galleries_hold_within_a_second_for_the_same_token(service: AccountService) -> None:
    north = await service.gallery("north")
    user = await service.user("ann", galleries=("north",))
    admin, tokens = bearer((await service.log_in()).access), await service.log_in("ann")
    assert (await service.runtime.access.authenticate(tokens.access)).galleries == (north.id,)
    await service.http.patch(f"/v1/users/{user.id}", json={"galleries": None}, headers=admin)
    assert (await service.runtime.access.authenticate(tokens.access)).galleries is None
    await service.http.patch(f"/v1/users/{user.id}", json={"galleries": []}, headers=admin)
    assert (await service.runtime.access.authenticate(tokens.access)).galleries == ()


async def test_a_disabled_user_cannot_log_in_until_enabled_and_old_logins_stay_ended(service: AccountService) -> None:
    user = await service.user("ann")
    admin, tokens = bearer((await service.log_in()).access), await service.log_in("ann")
    await service.http.patch(f"/v1/users/{user.id}", json={"disabled": True}, headers=admin)
    refused = await service.token(grant_type="password", username="ann", password=PASSWORD)
    assert refused.json()["error"] == "invalid_grant"
    await service.http.patch(f"/v1/users/{user.id}", json={"disabled": False}, headers=admin)
    assert not await service.holds(tokens.access)
    assert (await service.refresh(tokens.refresh)).status_code == 400
    assert await service.log_in("ann")


async def test_the_last_enabled_admin_stays(service: AccountService) -> None:
    admin = bearer((await service.log_in()).access)
    me = (await service.http.get("/v1/auth/me", headers=admin)).json()["id"]
    for change in ({"disabled": True}, {"roles": ["officer"]}):
        assert (await service.http.patch(f"/v1/users/{me}", json=change, headers=admin)).status_code == 409
    assert (await service.http.delete(f"/v1/users/{me}", headers=admin)).status_code == 409
    await service.user("second", Role.ADMIN)
    assert (await service.http.patch(f"/v1/users/{me}", json={"disabled": True}, headers=admin)).status_code == 200


async def test_two_admins_who_remove_each_other_at_once_leave_one(service: AccountService) -> None:
    for round_ in range(5):
        first, second = await service.user(f"a{round_}", Role.ADMIN), await service.user(f"b{round_}", Role.ADMIN)
        for user in await User.find({"_id": {"$nin": [first.id, second.id]}}).to_list():
            await user.delete()
        results = await asyncio.gather(
            delete_user(service.runtime, by_system("user.delete"), first.id),
            delete_user(service.runtime, by_system("user.delete"), second.id),
            return_exceptions=True,
        )
        assert sum(result is None for result in results) == 1
        assert await User.find({"roles": "admin", "disabled": False}).count() == 1


async def test_a_user_is_made_read_listed_changed_and_removed(service: AccountService) -> None:
    admin = bearer((await service.log_in()).access)
    await service.gallery("north")
    body = {"username": "Zoë Ågren", "password": PASSWORD, "roles": ["officer", "auditor"], "galleries": ["north"]}
    made = await service.http.post("/v1/users", json=body, headers=admin)
    assert made.status_code == 201
    user = made.json()
    assert made.headers["location"] == f"/v1/users/{user['id']}"
    assert set(user) == {
        "id", "username", "roles", "galleries", "disabled", "second_factor", "created_at", "updated_at",
    }  # fmt: skip
    assert (user["username"], user["roles"], user["galleries"], user["disabled"]) == (
        "Zoë Ågren",
        ["auditor", "officer"],
        ["north"],
        False,
    )
    assert user["created_at"].endswith("Z")
    assert (await service.http.get(f"/v1/users/{user['id']}", headers=admin)).json() == user

    page = (await service.http.get("/v1/users?limit=1", headers=admin)).json()
    assert page["items"] == [user]
    rest = (await service.http.get(f"/v1/users?limit=1&cursor={page['next_cursor']}", headers=admin)).json()
    assert [item["username"] for item in rest["items"]] == [ADMIN]
    assert rest["next_cursor"] is None

    patched = await service.http.patch(f"/v1/users/{user['id']}", json={"galleries": None}, headers=admin)
    assert patched.json() == user | {"galleries": None, "updated_at": patched.json()["updated_at"]}
    assert patched.json()["updated_at"] >= user["updated_at"]
    assert (await service.http.delete(f"/v1/users/{user['id']}", headers=admin)).status_code == 204
    for answer in (
        await service.http.get(f"/v1/users/{user['id']}", headers=admin),
        await service.http.patch(f"/v1/users/{user['id']}", json={}, headers=admin),
        await service.http.delete(f"/v1/users/{user['id']}", headers=admin),
    ):
        assert answer.status_code == 404
    for action in ("user.create", "user.update", "user.delete"):
        assert (await service.events(action))[-1 if action == "user.create" else 0].subject.id == user["id"]


async def test_h35_h57_a_user_of_another_form_is_refused(service: AccountService) -> None:
    headers = bearer((await service.log_in()).access) | {"Content-Type": "application/json"}
    ann = await service.user("ann")
    changes: list[Json] = [
        {"roles": ["relying_app"]}, {"roles": ["officer", "relying_app"]}, {"roles": []}, {"roles": ["king"]},
        {"roles": ["officer", "officer"]}, {"roles": None}, {"username": ""}, {"username": "x" * 65},
        {"username": "a\u202eb"}, {"username": " ann"}, {"username": "a\nb"}, {"username": None},
        {"username": "\ud800"}, {"password": "short"}, {"password": "x" * 257},
        {"password": "x" * 100_000}, {"password": None}, {"galleries": ["Not A Name"]},
        {"galleries": ["nobodys"]}, {"roles": ["enroller"]},
        {"galleries": "north"}, {"surprise": 1}, {"id": "mine"},
    ]  # fmt: skip
    for change in changes:
        body = json.dumps({"username": "bob", "password": PASSWORD, "roles": ["officer"]} | change)
        made = await service.http.post("/v1/users", content=body, headers=headers)
        patched = await service.http.patch(f"/v1/users/{ann.id}", content=json.dumps(change), headers=headers)
        assert (made.status_code, patched.status_code) == (422, 422), str(change)[:60]
        assert made.json()["type"].endswith("validation")
    assert await User.count() == 2
    assert await service.log_in("ann")


async def test_h32_a_username_is_unique_whatever_its_case(service: AccountService) -> None:
    admin = bearer((await service.log_in()).access)
    ann = await service.user("ann")
    body = {"username": "ANN", "password": PASSWORD, "roles": ["officer"]}
    assert (await service.http.post("/v1/users", json=body, headers=admin)).status_code == 409
    bob = await service.user("bob")
    assert (await service.http.patch(f"/v1/users/{bob.id}", json={"username": "Ann"}, headers=admin)).status_code == 409
    renamed = await service.http.patch(f"/v1/users/{ann.id}", json={"username": "Ann"}, headers=admin)
    assert renamed.json()["username"] == "Ann"
    answers = await asyncio.gather(
        *(service.http.post("/v1/users", json=body | {"username": "carl"}, headers=admin) for _ in range(3))
    )
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409]


async def test_a_client_is_changed_and_removed(service: AccountService) -> None:
    admin = bearer((await service.log_in()).access)
    made = (
        await service.http.post(
            "/v1/clients", json={"name": "kiosk", "galleries": None, "audiences": ["a"]}, headers=admin
        )
    ).json()
    assert (made["roles"], made["galleries"], made["audiences"]) == (["relying_app"], None, ["a"])
    patched = await service.http.patch(
        f"/v1/clients/{made['id']}", json={"audiences": [], "name": "gate"}, headers=admin
    )
    assert (patched.json()["name"], patched.json()["audiences"]) == ("gate", [])
    refused: list[Json] = [
        {"name": ""},
        {"client_secret": "x"},
        {"audiences": [""]},
        {"audiences": None},
        {"roles": []},
    ]
    for bad in refused:
        assert (await service.http.patch(f"/v1/clients/{made['id']}", json=bad, headers=admin)).status_code == 422
    listed = (await service.http.get("/v1/clients", headers=admin)).json()
    assert [item["name"] for item in listed["items"]] == ["gate"]
    form = {"grant_type": "client_credentials", "client_id": made["id"], "client_secret": made["client_secret"]}
    token = (await service.token(**form)).json()["access_token"]
    assert (await service.http.delete(f"/v1/clients/{made['id']}", headers=admin)).status_code == 204
    assert not await service.holds(token)
    assert (await service.token(**form)).json()["error"] == "invalid_client"


async def test_only_admins_keep_users_and_clients(service: AccountService) -> None:
    await service.user("ann", Role.OFFICER, Role.AUDITOR)
    officer = bearer((await service.log_in("ann")).access)
    calls = [
        ("GET", "/v1/users"), ("POST", "/v1/users"), ("GET", "/v1/users/x"), ("PATCH", "/v1/users/x"),
        ("DELETE", "/v1/users/x"), ("GET", "/v1/clients"), ("POST", "/v1/clients"), ("GET", "/v1/clients/x"),
        ("PATCH", "/v1/clients/x"), ("DELETE", "/v1/clients/x"), ("POST", "/v1/clients/x/rotate"),
    ]  # fmt: skip
    for method, path in calls:
        body = {"name": "x", "username": "x", "password": PASSWORD, "roles": ["auditor"]}
        content = json.dumps(
            {} if method == "PATCH" else {k: v for k, v in body.items() if ("user" in path) != (k == "name")}
        )
        headers = {"Content-Type": "application/json"}
        assert (
            await service.http.request(method, path, content=content, headers=officer | headers)
        ).status_code == 403, path
        assert (await service.http.request(method, path, content=content, headers=headers)).status_code == 401, path
    assert {event.outcome for event in await AuditEvent.find({"subject.kind": "none"}).to_list()} == {"denied"}


async def test_a_repeated_creation_with_one_idempotency_key_happens_once(service: AccountService) -> None:
    headers = bearer((await service.log_in()).access) | {"Idempotency-Key": "k1"}
    body = {"username": "ann", "password": PASSWORD, "roles": ["officer"]}
    first = await service.http.post("/v1/users", json=body, headers=headers)
    again = await service.http.post("/v1/users", json=body, headers=headers)
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json()
    assert again.headers["location"] == first.headers["location"]
    headers |= {"Idempotency-Key": "k2"}
    assert (
        await service.http.post("/v1/clients", json={"name": "kiosk", "galleries": None}, headers=headers)
    ).status_code == 201
    repeated = await service.http.post("/v1/clients", json={"name": "kiosk", "galleries": None}, headers=headers)
    assert (repeated.status_code, repeated.json()["type"].rsplit("/", 1)[-1]) == (409, "already-created")
    headers |= {"Idempotency-Key": "k3"}
    for _ in range(2):
        gone = await service.http.delete(f"/v1/users/{first.json()['id']}", headers=headers)
        assert gone.status_code == 204


async def test_no_secret_lies_in_the_database(service: AccountService) -> None:
    client, form = await service.client()
    secret, tokens = form["client_secret"], await service.log_in()
    renewed = (await service.refresh(tokens.refresh)).json()
    database = service.runtime.mongo[service.runtime.settings.mongodb_database]
    everything = [
        str(document) for name in await database.list_collection_names() async for document in database[name].find()
    ]
    assert len(everything) > 8
    for hidden in (PASSWORD, secret, tokens.refresh, tokens.access, renewed["refresh_token"], renewed["access_token"]):
        assert not any(hidden in text for text in everything)
    assert client.secret_hash != secret.encode()


async def test_development_credentials_are_brought_back_to_what_they_were(service: AccountService) -> None:
    runtime = service.runtime
    assert not await ensure_admin(runtime, "other", PASSWORD)
    fields = UserFields("demo", (Role.OFFICER,), None)
    made = await ensure_user(runtime, fields, PASSWORD)
    tokens = await service.log_in("demo")
    await ensure_user(runtime, fields, PASSWORD)
    assert await service.holds(tokens.access)
    admin = bearer((await service.log_in()).access)
    change = {"password": "another horse", "disabled": True, "roles": ["auditor"]}
    await service.http.patch(f"/v1/users/{made.id}", json=change, headers=admin)
    assert (await ensure_user(runtime, fields, PASSWORD)).id == made.id
    assert await service.log_in("demo")

    app, client_id, secret = ClientFields("demo", (Role.RELYING_APP,), None), str(uuid.uuid4()), new_secret()
    form = {"grant_type": "client_credentials", "client_id": client_id, "client_secret": secret}
    await ensure_client(runtime, client_id, secret, app)
    assert (await service.token(**form)).status_code == 200
    await service.http.post(f"/v1/clients/{client_id}/rotate", json={"overlap_hours": 0}, headers=admin)
    assert (await service.token(**form)).status_code == 400
    assert (await ensure_client(runtime, client_id, secret, replace(app, name="demo 2"))).name == "demo 2"
    assert (await service.token(**form)).status_code == 200


async def test_what_was_read_of_a_caller_before_a_change_here_does_not_outlive_it(
    service: AccountService, monkeypatch: pytest.MonkeyPatch
) -> None:
    north, south = await service.gallery("north"), await service.gallery("south")
    user, access = await service.user("ann", galleries=("north",)), service.runtime.access
    tokens = await service.log_in("ann")
    behind = callers._user_behind

    async def overtaken(claims: TokenClaims) -> Caller | None:
        read = await behind(claims)
        await user.update({"$set": {"galleries": [south.id]}})
        access.forget()
        return read

    monkeypatch.setattr(callers, "_user_behind", overtaken)
    assert (await access.authenticate(tokens.access)).galleries == (north.id,)
    monkeypatch.setattr(callers, "_user_behind", behind)
    assert (await access.authenticate(tokens.access)).galleries == (south.id,)


async def test_what_is_known_of_callers_takes_a_bounded_place(
    service: AccountService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callers, "STANDINGS_KEPT", 2)
    tokens = [await service.log_in() for _ in range(4)]
    for one in tokens * 2:
        assert await service.holds(one.access)
    assert len(service.runtime.access._standings) <= 2


async def test_a_username_is_one_in_all_its_spellings(service: AccountService) -> None:
    await service.user("Ann\u2011Lee 7", Role.OFFICER)
    for spelling in ("ann-lee 7", "ANN\u2013LEE  \u0667", "Ann-\u200bLee\u00a07"):
        assert (await service.token(grant_type="password", username=spelling, password=PASSWORD)).status_code == 200
    tokens = await service.log_in()
    fields = {"username": "ANN\u2212lee 7", "password": PASSWORD, "roles": ["officer"]}
    answer = await service.http.post("/v1/users", json=fields, headers=bearer(tokens.access))
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (409, "taken")
    unseen = await service.http.post("/v1/users", json=fields | {"username": "\u3164"}, headers=bearer(tokens.access))
    assert unseen.status_code == 422


async def test_users_of_an_older_version_log_in_by_the_spelling_that_they_had(service: AccountService) -> None:
    plain = await service.user("ann-lee", Role.OFFICER)
    odd = await service.user("bob", Role.OFFICER)
    former = {"username": "ann\u2013lee", "username_key": "ann\u2013lee"}
    await User.get_pymongo_collection().update_one({"_id": odd.id}, {"$set": former})
    for username, user in (("Ann-Lee", plain), ("ANN\u2013LEE", odd)):
        tokens = await service.log_in(username)
        me = await service.http.get("/v1/auth/me", headers=bearer(tokens.access))
        assert me.json()["id"] == user.id
    admin = bearer((await service.log_in()).access)
    changed = await service.http.patch(f"/v1/users/{odd.id}", json={"roles": ["auditor"]}, headers=admin)
    assert changed.status_code == 200
    for name in ("ann\u2013lee", "ann-lee"):
        fields = {"username": name, "password": PASSWORD, "roles": ["officer"]}
        assert (await service.http.post("/v1/users", json=fields, headers=admin)).status_code == 409
    await service.log_in("ann\u2013lee")
