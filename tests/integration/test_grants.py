"""Rights are bound to a gallery's id, and an audience belongs to one client."""

import asyncio
from typing import Any

import httpx
import pymongo
import pytest

from app.access.callers import client_as_caller, user_as_caller
from app.audit import by_system
from app.config import Settings
from app.devstack import servers
from app.documents import account_migrations
from app.documents.accounts import Client, User, kept_by
from app.documents.audiences import AudienceClaim
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery
from app.domain.callers import Caller, Role
from app.errors import Conflict, Forbidden
from app.runtime import open_runtime
from app.use_cases import check, galleries
from app.use_cases.keep_clients import ClientFields, create_client, delete_client, update_client
from tests.fakes import FakeEngine
from tests.support.accounts import PASSWORD, AccountService, bearer

Json = dict[str, Any]
BANK = "https://bank.example"


async def as_admin(service: AccountService) -> dict[str, str]:
    """The headers of the admin."""
    return bearer((await service.log_in()).access)


async def bound_admin(service: AccountService, *names: str) -> dict[str, str]:
    """The headers of an admin who is bound to these galleries."""
    await service.user("bound", Role.ADMIN, galleries=names)
    return bearer((await service.log_in("bound")).access)


async def new_client(service: AccountService, admin: dict[str, str], **fields: object) -> httpx.Response:
    """The answer about a new client."""
    body: Json = {"name": "bank", "galleries": None, **fields}
    return await service.http.post("/v1/clients", json=body, headers=admin)


async def usable(client_id: str) -> tuple[str, ...]:
    """The audiences that the client may use besides its own id."""
    client = await Client.get(client_id)
    assert client is not None
    own, *others = await AudienceClaim.usable_by(client)
    assert own == client_id
    return tuple(others)


def advice(answer: httpx.Response) -> tuple[int, str, str]:
    """Status, field and code of a refusal."""
    error = answer.json()["errors"][0]
    return answer.status_code, error["field"], error["code"]


# Rights.


@pytest.mark.parametrize("kind", ["users", "clients"])
async def test_grants_are_given_and_shown_by_name_and_kept_by_id(service: AccountService, kind: str) -> None:
    north, admin = await service.gallery("north"), await as_admin(service)
    new = {"username": "ann", "password": PASSWORD, "roles": ["officer"]} if kind == "users" else {"name": "bank"}
    made = await service.http.post(
        f"/v1/{kind}", json=new | {"galleries": ["north", "default", "north"]}, headers=admin
    )
    assert made.json()["galleries"] == ["north", "default"]
    default = await Gallery.require("default")
    stored = await (User if kind == "users" else Client).get(made.json()["id"])
    assert stored is not None
    assert stored.galleries == [north.id, default.id]
    listed = (await service.http.get(f"/v1/{kind}", headers=admin)).json()["items"]
    assert listed[0]["galleries"] == ["north", "default"]
    path = f"/v1/{kind}/{made.json()['id']}"
    for names in (["nobodys"], ["north", "nobodys"]):
        unknown = await service.http.patch(path, json={"galleries": names}, headers=admin)
        assert advice(unknown) == (422, "galleries", "unknown")
        unknown = await service.http.post(
            f"/v1/{kind}", json=new | {"username": "b"} | {"galleries": names}, headers=admin
        )
        assert unknown.status_code == 422
    assert (await service.http.get(path, headers=admin)).json()["galleries"] == ["north", "default"]


async def test_a_deleted_gallery_takes_its_grants_and_the_next_of_its_name_gives_none(service: AccountService) -> None:
    await service.gallery("north")
    admin = await as_admin(service)
    user = await service.user("ann", galleries=("north", "default"))
    client, form = await service.client(galleries=("north",))
    app, ann = (
        bearer((await service.token(**form)).json()["access_token"]),
        bearer((await service.log_in("ann")).access),
    )
    assert (await service.http.get("/v1/galleries/north", headers=app)).status_code == 200
    assert (await service.http.delete("/v1/galleries/north", headers=admin)).status_code == 204
    assert (await service.http.post("/v1/galleries", json={"name": "north"}, headers=admin)).status_code == 201
    for headers, left in ((app, []), (ann, ["default"])):
        assert (await service.http.get("/v1/galleries/north", headers=headers)).status_code == 404
        assert (await service.http.get("/v1/auth/me", headers=headers)).json()["galleries"] == left
        assert [
            one["name"] for one in (await service.http.get("/v1/galleries", headers=headers)).json()["items"]
        ] == left
    for id_, kind, old, new in (
        (user.id, "user", ["default", "north"], ["default"]), (client.id, "client", ["north"], []),
    ):  # fmt: skip
        (event,) = await AuditEvent.find({"subject.id": id_, "action": f"{kind}.update"}).to_list()
        assert event.detail["changes"] == {"galleries": {"old": old, "new": new}}
        assert (event.gallery, event.actor.kind) == ("north", "user")


async def test_another_process_gives_nothing_by_what_it_remembers_of_a_caller(service: AccountService) -> None:
    north = await service.gallery("north")
    _, form = await service.client(galleries=("north",))
    token = (await service.token(**form)).json()["access_token"]
    remembered = await service.runtime.access.authenticate(token)
    await galleries.delete(service.runtime, by_system("gallery.delete"), north)
    again = await service.gallery("north")
    # As a process sees the caller for half a second.
    assert remembered.may_see(north.id)
    assert not remembered.may_see(again.id)


async def test_an_auditor_of_a_gallery_sees_no_event_of_its_namesake(service: AccountService) -> None:
    admin = await as_admin(service)
    for round_ in range(2):
        assert (await service.http.post("/v1/galleries", json={"name": "north"}, headers=admin)).status_code == 201
        if not round_:
            assert (await service.http.delete("/v1/galleries/north", headers=admin)).status_code == 204
    await service.user("nora", Role.AUDITOR, galleries=("north",))
    nora = bearer((await service.log_in("nora")).access)
    for query in ("", "?gallery=north"):
        events = (await service.http.get(f"/v1/audit/events{query}", headers=nora)).json()["items"]
        assert [event["action"] for event in events] == ["gallery.create"], query
    everything = (await service.http.get("/v1/audit/events?gallery=north", headers=admin)).json()["items"]
    assert [event["action"] for event in everything] == ["gallery.create", "gallery.delete", "gallery.create"]
    former = everything[-1]["id"]
    assert (await service.http.get(f"/v1/audit/events/{former}", headers=nora)).status_code == 404


async def test_an_account_bound_to_a_gallery_that_is_gone_can_still_be_kept(service: AccountService) -> None:
    admin = await as_admin(service)
    user = await service.user("ann", galleries=("default",))
    await user.update({"$set": {"galleries": ["gone"]}})
    patched = await service.http.patch(f"/v1/users/{user.id}", json={"username": "anna"}, headers=admin)
    assert (patched.status_code, patched.json()["galleries"]) == (200, [])


async def test_a_bound_admin_sees_and_gives_by_id(service: AccountService) -> None:
    north = await service.gallery("north")
    await service.gallery("south")
    bound = await bound_admin(service, "north")
    await service.user("ann", galleries=("north",))
    await service.user("bob", galleries=("south",))
    seen = (await service.http.get("/v1/users", headers=bound)).json()["items"]
    assert {user["username"] for user in seen} == {"ann", "bound"}
    for names in (["south"], ["nobodys"], None):
        answer = await service.http.patch(f"/v1/users/{seen[0]['id']}", json={"galleries": names}, headers=bound)
        assert advice(answer) == (403, "galleries", "not-yours"), names
    caller = Caller("a", "user", "a", frozenset({Role.ADMIN}), (north.id,), "t")
    assert await User.find(kept_by(caller)).count() == 2


# Roles of clients.


@pytest.mark.parametrize(
    "roles", [["officer"], ["admin"], ["auditor"], ["relying_app", "officer"], [], ["enroller", "enroller"], None]
)
async def test_a_client_has_no_role_of_people(service: AccountService, roles: list[str] | None) -> None:
    admin = await as_admin(service)
    made = (await new_client(service, admin)).json()
    assert (await new_client(service, admin, roles=roles)).status_code == 422
    assert (
        await service.http.patch(f"/v1/clients/{made['id']}", json={"roles": roles}, headers=admin)
    ).status_code == 422


async def test_a_client_has_one_or_both_roles_of_clients_and_its_galleries_are_given(service: AccountService) -> None:
    admin = await as_admin(service)
    for roles in (["relying_app"], ["enroller"], ["enroller", "relying_app"]):
        made = await new_client(service, admin, roles=roles)
        assert (made.status_code, made.json()["roles"]) == (201, roles)
    left_out = await service.http.post("/v1/clients", json={"name": "bank"}, headers=admin)
    assert (left_out.status_code, left_out.json()["errors"][0]["field"]) == (422, "galleries")


# What events record.


async def test_events_of_accounts_record_old_and_new_values(service: AccountService) -> None:
    await service.gallery("north")
    admin = await as_admin(service)
    body: Json = {"username": "ann", "password": PASSWORD, "roles": ["officer"], "galleries": ["north"]}
    ann = (await service.http.post("/v1/users", json=body, headers=admin)).json()["id"]
    await service.http.patch(f"/v1/users/{ann}", json={"galleries": None, "password": "another horse"}, headers=admin)
    await service.http.patch(f"/v1/users/{ann}", json={"galleries": [], "disabled": True}, headers=admin)
    await service.http.delete(f"/v1/users/{ann}", headers=admin)
    bank = (await new_client(service, admin, audiences=[BANK])).json()["id"]
    await service.http.patch(f"/v1/clients/{bank}", json={"audiences": [], "roles": ["enroller"]}, headers=admin)
    told = [
        event.detail["changes"]
        for event in await AuditEvent.find({"subject.id": {"$in": [ann, bank]}, "outcome": "success"})
        .sort("_id")
        .to_list()
    ]
    assert told == [
        {
            "roles": {"old": None, "new": ["officer"]}, "galleries": {"old": None, "new": ["north"]},
            "disabled": {"old": None, "new": False}, "second_factor": {"old": None, "new": False},
        },
        {"galleries": {"old": ["north"], "new": None}},
        {"galleries": {"old": None, "new": []}, "disabled": {"old": False, "new": True}},
        {
            "roles": {"old": ["officer"], "new": None}, "galleries": {"old": [], "new": None},
            "disabled": {"old": True, "new": None}, "second_factor": {"old": False, "new": None},
        },
        {"roles": {"old": None, "new": ["relying_app"]}, "audiences": {"old": None, "new": [BANK]}},
        {"roles": {"old": ["relying_app"], "new": ["enroller"]}, "audiences": {"old": [BANK], "new": []}},
    ]  # fmt: skip
    (changed, *_) = await AuditEvent.find({"action": "user.update"}).sort("_id").to_list()
    assert changed.detail["password_changed"] is True
    assert PASSWORD not in str(changed.detail)
    assert "another horse" not in str(changed.detail)


# Audiences.


async def test_a8_an_audience_belongs_to_one_client_and_an_id_to_its_own(service: AccountService) -> None:
    admin = await as_admin(service)
    bank = (await new_client(service, admin, audiences=[BANK])).json()["id"]
    other = (await new_client(service, admin)).json()["id"]
    for taken in (BANK, bank):
        assert advice(await new_client(service, admin, audiences=["free", taken])) == (409, "audiences", "taken")
        patched = await service.http.patch(f"/v1/clients/{other}", json={"audiences": [taken]}, headers=admin)
        assert advice(patched) == (409, "audiences", "taken")
    assert await usable(bank) == (BANK,)
    assert await usable(other) == ()
    assert await Client.count() == 2
    # A refusal claims nothing, and what one client gives back another one may have.
    assert (await new_client(service, admin, audiences=["free"])).status_code == 201
    assert (await service.http.patch(f"/v1/clients/{bank}", json={"audiences": []}, headers=admin)).status_code == 200
    patched = await service.http.patch(f"/v1/clients/{other}", json={"audiences": [BANK]}, headers=admin)
    assert patched.status_code == 200
    assert await usable(other) == (BANK,)
    assert (await service.http.delete(f"/v1/clients/{other}", headers=admin)).status_code == 204
    assert (await new_client(service, admin, audiences=[BANK])).status_code == 201


async def test_a8_of_admins_who_give_one_audience_at_once_one_succeeds(service: AccountService) -> None:
    admin = await as_admin(service)
    ids = [(await new_client(service, admin)).json()["id"] for _ in range(2)]
    answers = await asyncio.gather(
        *(new_client(service, admin, audiences=[BANK]) for _ in range(3)),
        *(service.http.patch(f"/v1/clients/{id_}", json={"audiences": [BANK]}, headers=admin) for id_ in ids),
    )
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(409) == 4
    assert await Client.find({"audiences": BANK}).count() == 1


async def test_a8_an_admin_bound_to_galleries_gives_and_takes_no_audience(service: AccountService) -> None:
    await service.gallery("north")
    admin, bound = await as_admin(service), await bound_admin(service, "north")
    refused = await new_client(service, bound, galleries=["north"], audiences=[BANK])
    assert advice(refused) == (403, "audiences", "not-yours")
    own = (await new_client(service, admin, galleries=["north"], audiences=[BANK])).json()["id"]
    for audiences in ([], [BANK, "more"]):
        patched = await service.http.patch(f"/v1/clients/{own}", json={"audiences": audiences}, headers=bound)
        assert advice(patched) == (403, "audiences", "not-yours")
    kept = {"name": "renamed", "audiences": [BANK]}
    assert (await service.http.patch(f"/v1/clients/{own}", json=kept, headers=bound)).status_code == 200
    assert await usable(own) == (BANK,)


async def written_by_an_older_version(
    *audiences: str, galleries: list[str] | None = None, roles: str = "relying_app"
) -> str:
    """A client as the version before stored it. Returns its id."""
    client = Client(name="old", secret_hash=b"x", roles=[], galleries=galleries, audiences=list(audiences))
    await client.insert()
    await Client.get_pymongo_collection().update_one({"_id": client.id}, {"$set": {"roles": roles.split()}})
    return client.id


async def test_a8_what_two_clients_have_at_an_upgrade_is_listed_and_nobodys_until_an_admin_decides(
    settings: Settings,
) -> None:
    async with open_runtime(settings, FakeEngine()):
        one, other = [await written_by_an_older_version(BANK, own) for own in ("one", "other")]
        thief = await written_by_an_older_version(one)
    async with open_runtime(settings, FakeEngine()) as runtime:
        for _ in range(2):
            client = await Client.get(one)
            assert client is not None
            caller = await runtime.access.authenticate((await runtime.access.issue(client)).text)
            assert caller.audiences == (one, "one")
            assert await usable(one) == ("one",)
            assert await usable(other) == ("other",)
            assert await usable(thief) == ()
            found = await check.check(runtime, lambda *_: None, photos=False)
            listed = {f.subject: f.message for f in found.findings if f.kind == "audience-contested"}
            assert set(listed) == {BANK, one}
            assert one in listed[BANK]
            assert other in listed[BANK]
            assert await Client.find({"audiences": BANK}).count() == 2, "nothing is taken from either"
        with pytest.raises(Conflict):
            await create_client(
                runtime, by_system("client.create"), ClientFields("new", (Role.RELYING_APP,), None, (BANK,))
            )
        await update_client(
            runtime, by_system("client.update"), one,
            lambda old: ClientFields(old.name, old.roles, old.galleries, ("one",)),
        )  # fmt: skip
        assert await usable(other) == (BANK, "other")
        await delete_client(runtime, by_system("client.delete"), thief)
        found = await check.check(runtime, lambda *_: None, photos=False)
        assert "audience-contested" not in found.counts


async def test_a_store_with_thousands_of_clients_is_migrated_within_the_time_of_a_transaction(
    settings: Settings,
) -> None:
    row: Json = {"roles": ["relying_app"], "galleries": None}
    rows = [{**row, "_id": f"client-{number}", "audiences": [f"https://{number}"]} for number in range(4000)]
    async with pymongo.AsyncMongoClient[Json](settings.mongodb_uri) as client:
        database = client[settings.mongodb_database]
        await database["clients"].insert_many(rows)
        with pymongo.timeout(3 * servers.TRANSACTION_SECONDS):
            assert await account_migrations.audience_claims(database) == 2 * len(rows)
            assert await account_migrations.audience_claims(database) == 0


async def test_a8_an_owner_stays_the_owner_when_an_older_process_gives_the_audience_again(settings: Settings) -> None:
    async with open_runtime(settings, FakeEngine()) as runtime:
        fields = ClientFields("bank", (Role.RELYING_APP,), None, (BANK,))
        bank, _ = await create_client(runtime, by_system("client.create"), fields)
        intruder = await written_by_an_older_version(BANK)
        assert await usable(intruder) == ()
    async with open_runtime(settings, FakeEngine()) as runtime:
        assert await usable(bank.id) == (BANK,)
        assert await usable(intruder) == ()
        found = await check.check(runtime, lambda *_: None, photos=False)
        assert found.counts["audience-contested"] == 1


# What older versions stored.


def raw(settings: Settings, collection: str) -> dict[str, Json]:
    """The stored documents of a collection, by id."""
    with pymongo.MongoClient[Json](settings.mongodb_uri) as client:
        return {row["_id"]: row for row in client[settings.mongodb_database][collection].find()}


async def test_stored_names_become_ids_and_names_without_a_gallery_go_with_an_event(settings: Settings) -> None:
    async with open_runtime(settings, FakeEngine()) as runtime:
        north = await runtime.create_gallery("north", runtime.starting_policy())
        bank = await written_by_an_older_version(galleries=["north", "gone"])
        all_ = await written_by_an_older_version()
        user = User(username="ann", username_key="ann", password_hash="", roles=[Role.OFFICER], galleries=["north"])
        await user.insert()
        # Until a process starts, names give nothing.
        assert not user_as_caller(user).may_see(north.id)
    for _ in range(2):
        async with open_runtime(settings, FakeEngine()):
            assert (
                raw(settings, "clients")[bank]["galleries"]
                == raw(settings, "users")[user.id]["galleries"]
                == [north.id]
            )
            assert raw(settings, "clients")[all_]["galleries"] is None
            (event,) = await AuditEvent.find({"action": {"$in": ["user.update", "client.update"]}}).to_list()
            assert (event.subject.id, event.actor.kind) == (bank, "system")
            assert event.detail == {"changes": {"galleries": {"old": ["gone", "north"], "new": ["north"]}}}


async def test_a_gallery_that_is_made_while_another_process_starts_keeps_its_grants(settings: Settings) -> None:
    class Meanwhile:
        """The database; an admin makes a gallery and a client for it just before the accounts are read."""

        def __init__(self, database: Any) -> None:  # noqa: ANN401 - stands for the driver's
            self._database = database
            self.client = database.client

        def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - the driver's collection
            if name == "users" and not raw(settings, "clients"):
                with pymongo.MongoClient[Json](settings.mongodb_uri) as client:
                    client[settings.mongodb_database]["galleries"].insert_one({"_id": "g-new", "name": "new"})
                    row = {"_id": "c-new", "roles": ["relying_app"], "galleries": ["g-new"]}
                    client[settings.mongodb_database]["clients"].insert_one(row)
            return self._database[name]

    async with pymongo.AsyncMongoClient[Json](settings.mongodb_uri) as client:
        await account_migrations.grants_by_id(Meanwhile(client[settings.mongodb_database]))  # type: ignore[arg-type]
    assert raw(settings, "clients")["c-new"]["galleries"] == ["g-new"]
    assert raw(settings, "audit_events") == {}


async def test_clients_lose_other_roles_once_with_an_event_and_keep_the_rest(settings: Settings) -> None:
    async with open_runtime(settings, FakeEngine()):
        both = await written_by_an_older_version(roles="relying_app officer")
        none = await written_by_an_older_version(roles="admin")
        right = await written_by_an_older_version(roles="relying_app")
        for id_ in (both, none):  # until a process starts, other roles count for nothing
            client = await Client.get(id_)
            assert client is not None
            assert client_as_caller(client).roles <= {Role.RELYING_APP}
    before = raw(settings, "clients")[right]
    for _ in range(2):
        async with open_runtime(settings, FakeEngine()) as runtime:
            stored = raw(settings, "clients")
            assert (stored[both]["roles"], stored[none]["roles"]) == (["relying_app"], [])
            assert stored[right] == before
            events = await AuditEvent.find({"action": "client.update"}).sort("subject.id").to_list()
            assert {event.subject.id: event.detail["changes"] for event in events} == {
                both: {"roles": {"old": ["officer", "relying_app"], "new": ["relying_app"]}},
                none: {"roles": {"old": ["admin"], "new": []}},
            }
            assert len(events) == 2
    async with open_runtime(settings, FakeEngine()) as runtime:
        # It can be renamed, and given a role of clients.
        fields = await update_client(
            runtime, by_system("client.update"), none, lambda old: ClientFields("new", old.roles, old.galleries)
        )
        assert (fields.name, fields.roles) == ("new", [])
        with pytest.raises(Forbidden):
            bound = by_system("client.update")
            bound.caller = Caller("a", "user", "a", frozenset({Role.ADMIN}), (), "t")
            await create_client(runtime, bound, ClientFields("x", (Role.RELYING_APP,), None))
