"""The audit log on a real MongoDB: numbered once, in one order, whoever dies meanwhile; proved, signed, delivered, forgotten."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from click.testing import Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from fastapi import FastAPI
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import ExecutionTimeout, OperationFailure, PyMongoError
from typer.testing import CliRunner

from app.api import audit as doors
from app.api.dependencies import Acting
from app.api.envelope import Envelope
from app.api.problems import install
from app.audit import Action, Typed, by_system, record, refuse, rotate_key
from app.cli import audit as command
from app.documents.base import now
from app.documents.claims import IdempotencyClaim, Once
from app.documents.events import AuditEvent, StrangerCount
from app.documents.leases import Lease
from app.documents.tree import AuditKey, AuditTree, TreeHead, TreeNode
from app.domain.callers import Caller, Role
from app.domain.log_check import Head, Report, check_export
from app.domain.log_export import canonical, head_bytes, personal_hash
from app.domain.merkle import EMPTY_ROOT, Growth, leaf_hash, proves_consistency, proves_inclusion
from app.errors import AuditRefused, Forbidden, IdempotencyInProgress, NotFound, NotReady, Problem, Unauthenticated
from app.leases import Held
from app.runtime import Runtime
from app.use_cases import sequence, tend_log
from app.use_cases.check import check
from app.use_cases.sequence import deliver, grow, head_over, kept_up, sign
from storage.evidence import EvidenceUnavailable, FolderEvidence
from tests.builders import another_process, by_officer, enrolled
from tests.support import audit_load

AUDITOR = Caller("auditor-1", "user", "Aud Itor", frozenset({Role.AUDITOR}), None, "token-3", "session-3")
NORTHERN = Caller("auditor-2", "user", "Nora", frozenset({Role.AUDITOR}), (), "token-4", "session-4")


async def _told(count: int, *, gallery: str | None = None, **fields: object) -> list[AuditEvent]:
    """So many events by an officer."""
    made = []
    for number in range(count):
        action = Action(name="face.verify", caller=AUDITOR, request_id=f"request-{number}", ip="192.0.2.1")
        for name, value in fields.items():
            setattr(action, name, value)
        detail = {"score": 0.36, "number": number}
        made.append(
            await record(None, action, subject_kind="identity", subject_id="ann", gallery=gallery, detail=detail)
        )
    return made


async def _numbered() -> list[AuditEvent]:
    """The events in the tree, by their numbers; with what must hold of any tree."""
    events = await AuditEvent.find({"seq": {"$ne": None}}).sort("+seq").to_list()
    tree = await AuditTree.current()
    assert [event.seq for event in events] == list(range(tree.size)), "numbers have neither holes nor doubles"
    growth = Growth()
    nodes = {}
    for event in events:
        assert event.seq is not None
        hash_ = leaf_hash(canonical(event.leaf(event.seq)))
        assert hash_.hex() == event.leaf_hash
        nodes |= dict(growth.add(hash_))
    assert growth.peaks == tree.peaks
    stored = {node.id: node.hash for node in await TreeNode.find_all().to_list()}
    assert stored == {TreeNode.name(node): hash_ for node, hash_ in nodes.items()}
    return events


@pytest.fixture
async def http(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[httpx.AsyncClient]:
    """The audit routes, asked by whoever the bearer's token names: `auditor` or `northern`."""
    north = await runtime.create_gallery("north", runtime.starting_policy())
    northern = replace(NORTHERN, galleries=(north.id,))

    async def authenticated(_: Acting, request: object) -> Caller:
        del _
        header = getattr(request, "headers")["authorization"]  # noqa: B009 - a Request
        return northern if header.endswith("northern") else AUDITOR

    monkeypatch.setattr(Acting, "_authenticated", authenticated)
    app = FastAPI()
    app.state.runtime = runtime
    app.include_router(doors.router)
    install(app)
    app.add_middleware(Envelope, body_limit=runtime.settings.max_json_bytes)
    transport = httpx.ASGITransport(app, client=("192.0.2.7", 1))
    headers = {"Authorization": "Bearer auditor"}
    async with httpx.AsyncClient(transport=transport, base_url="http://idem.test", headers=headers) as client:
        yield client


async def _keys() -> dict[str, bytes]:
    return {key.id: key.public for key in await AuditKey.find_all().to_list()}


async def _checked(answer: httpx.Response, *, partial: bool = False, heads: list[Head] | None = None) -> Report:
    assert answer.status_code == 200, answer.text
    form = "csv" if "csv" in answer.headers["content-type"] else "ndjson"
    lines = answer.content.splitlines(keepends=True)
    return check_export(lines, "csv" if form == "csv" else "ndjson", await _keys(), heads or [], is_partial=partial)


async def test_events_are_numbered_once_and_in_one_order_by_two_at_once(runtime: Runtime) -> None:
    await _told(120)
    async with another_process(runtime) as other:
        telling = [_told(20) for _ in range(4)]
        await asyncio.gather(_eventually_grown(runtime), _eventually_grown(other), *telling)
    await _eventually_grown(runtime)
    assert len(await _numbered()) == 200
    assert await grow(runtime) == 0


async def test_an_event_is_stored_as_any_document_is(runtime: Runtime) -> None:
    del runtime
    event = await record(
        None, by_officer("x"), subject_kind="none", subject_id=None,
        detail={"score": 0.5, "none": None, "reason": Typed("moved")},
    )  # fmt: skip
    await event.model_copy(update={"id": "another"}).insert()
    entered, inserted = await AuditEvent.get_pymongo_collection().find({"action": "x"}).to_list()
    assert entered.pop("_id") == event.id
    assert inserted.pop("_id") == "another"
    assert list(entered.items()) == list(inserted.items())


async def test_waiting_events_are_found_without_reading_the_log(runtime: Runtime) -> None:
    await _told(30)
    await grow(runtime)
    await _told(3)
    events = AuditEvent.get_pymongo_collection()
    query = events.find({"seq": {"$type": "null"}}).sort([("seq", 1), ("_id", 1)]).limit(500)
    plan = (await query.explain())["executionStats"]
    assert (plan["nReturned"], plan["totalKeysExamined"], plan["totalDocsExamined"]) == (3, 3, 3)


async def test_h60_the_order_is_that_of_the_commits_whatever_a_clock_says(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter([now() + timedelta(hours=1), now() - timedelta(days=1), now()])
    monkeypatch.setattr("app.audit.now", lambda: next(moments))
    made = []
    for _ in range(3):
        made += await _told(1)
        await grow(runtime)
    events = await _numbered()
    assert [event.id for event in events] == [event.id for event in made]
    assert [event.time for event in events] != sorted(event.time for event in events)


async def test_h60_heads_are_in_the_order_of_their_sizes_though_the_clock_jumps_back(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _told(2)
    await grow(runtime)
    first = await sign(runtime)
    monkeypatch.setattr("app.use_cases.sequence.now", lambda: now() - timedelta(seconds=30))
    await _told(1)
    await grow(runtime)
    second = await sign(runtime)
    assert (second.time, second.key_id) == (first.time + timedelta(milliseconds=1), first.key_id)
    assert await sign(runtime) == second, "one head for a size"


async def test_a_new_key_follows_heads_dated_ahead_when_the_clock_is_right_again(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("app.use_cases.sequence.now", lambda: now() + timedelta(days=40))
        await _told(2)
        await grow(runtime)
        ahead = await sign(runtime)
    await _told(1)
    await grow(runtime)
    right = await sign(runtime)
    assert abs(right.time - now()) < timedelta(seconds=5)
    assert right.key_id != ahead.key_id
    assert await TreeHead.newest() == right, (
        "the newest head is the one over most events, not the one with the latest time"
    )
    await grow(runtime)  # numbers the event that says why there is a new key
    last = await sign(runtime)
    assert (last.size, last.key_id) == (4, right.key_id)
    assert await deliver(runtime) == 0
    assert (await check(runtime, lambda *_: None)).findings == [], "the log agrees with every head outside"
    told = await AuditEvent.find_one({"action": "audit.rotate_key"})
    assert told is not None
    assert "the clock was ahead" in str(told.detail["reason"])


@pytest.mark.parametrize("days", [40, -3])
async def test_a_host_whose_clock_differs_signs_nothing(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    await _told(1)
    await grow(runtime)
    real = time.time
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: real() + days * 86_400)
        with pytest.raises(NotReady, match=f"The host's clock is {abs(days)} days"):
            await sign(runtime)
    assert await TreeHead.count() == 0
    assert abs((await sign(runtime)).time - now()) < timedelta(seconds=5)


async def test_a_process_killed_while_it_numbers_loses_and_doubles_nothing(runtime: Runtime) -> None:
    await _told(40)
    settings = runtime.settings.model_dump_json(include={
        "mongodb_uri", "mongodb_database", "storage_path", "evidence_path", "vector_db_path", "index_cache_path",
    })  # fmt: skip
    killed = f"""
import asyncio, json, os, signal
from pydantic import SecretStr
from app.config import Settings
from app.documents.tree import TreeNode
from app.runtime import open_runtime
from app.use_cases.sequence import grow
from tests.fakes import FakeEngine

async def main():
    settings = Settings(**json.loads({settings!r}), key_encryption_key=SecretStr({runtime.settings.key_encryption_secret()!r}))
    async with open_runtime(settings, FakeEngine()) as runtime:
        # The last thing before the commit.
        TreeNode.get_pymongo_collection = lambda: os.kill(os.getpid(), signal.SIGKILL)
        await grow(runtime)

asyncio.run(main())
"""
    ended = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", killed], check=False, capture_output=True)
    assert ended.returncode == -9, ended.stderr
    await _told(5)
    await _eventually_grown(runtime)
    assert len(await _numbered()) == 45


async def _eventually_grown(runtime: Runtime) -> None:
    """Grown, though a dead process's transaction may still hold the tree for a moment."""
    async with asyncio.timeout(20):
        while await AuditEvent.unnumbered(1):
            try:
                await grow(runtime)
            except PyMongoError:
                await asyncio.sleep(0.1)


async def test_an_event_is_numbered_signed_and_delivered_within_seconds_though_the_worker_before_died(
    runtime: Runtime,
) -> None:
    runtime.settings.audit_head_seconds = 0.1
    assert await Held.acquire(sequence.LEASE, "a process that died", 1.0)
    (event,) = await _told(1)
    started = time.monotonic()
    async with kept_up(runtime):
        while await TreeHead.find({"is_delivered": True, "size": 1}).count() == 0:
            assert time.monotonic() - started < 30
            await asyncio.sleep(0.02)
    assert [known.id for known in await _numbered()] == [event.id]
    names = await runtime.evidence.names("heads/")
    newest = await TreeHead.newest()
    assert newest is not None
    assert json.loads(await runtime.evidence.read(names[-1])) == newest.head.as_json()
    assert not await Lease.alive(sequence.LEASE), "given back"


async def test_an_event_gets_its_number_within_a_second(runtime: Runtime) -> None:
    waits = []
    async with kept_up(runtime):
        for _ in range(5):  # the machine may be busy with something else
            (event,) = await _told(1)
            started = time.monotonic()
            while await AuditEvent.find({"_id": event.id, "seq": {"$ne": None}}).count() == 0:
                await asyncio.sleep(0.01)
            waits.append(time.monotonic() - started)
    assert min(waits) < 1


async def test_heads_wait_for_an_evidence_store_that_is_away_and_none_is_lost(runtime: Runtime, tmp_path: Path) -> None:
    blocked = runtime.settings.evidence_path
    blocked.rename(tmp_path / "aside")
    blocked.write_text("a file where the folder should be")
    heads = []
    for _ in range(3):
        await _told(1)
        await grow(runtime)
        heads.append(await sign(runtime))
        assert await deliver(runtime) == len(heads)
    assert await TreeHead.waiting() == 3
    blocked.unlink()
    (tmp_path / "aside").rename(blocked)
    assert await deliver(runtime) == 0
    (name,) = await runtime.evidence.names("heads/")
    assert Head.of(json.loads(await runtime.evidence.read(name))) == heads[-1].head, "it proves the heads before it"
    assert await TreeHead.waiting() == 0
    assert [head.id async for head in TreeHead.outside()] == [heads[-1].id]


async def test_h96_other_bytes_under_a_heads_name_are_kept_for_the_auditor_and_hold_nothing_up(
    runtime: Runtime,
) -> None:
    await _told(1)
    await grow(runtime)
    forged = await sign(runtime)
    await runtime.evidence.append(forged.evidence[0], b"something else")
    await _told(1)
    await grow(runtime)
    good = await sign(runtime)
    assert await deliver(runtime) == 0
    assert await runtime.evidence.read(forged.evidence[0]) == b"something else"
    assert await runtime.evidence.read(good.evidence[0]) == good.evidence[1]


async def test_the_checkpoint_of_a_fresh_log_is_a_signed_head_over_nothing(http: httpx.AsyncClient) -> None:
    head = (await http.get("/v1/audit/checkpoint")).json()
    assert (head["size"], head["root_hash"]) == (0, EMPTY_ROOT.hex())
    (key,) = (await http.get("/v1/audit/keys")).json()["keys"]
    assert await AuditEvent.count() == 0, "reading the log makes no events"
    message = head_bytes(head["size"], head["root_hash"], head["time"], head["key_id"])
    assert (key["key_id"], key["retired_at"]) == (head["key_id"], None)
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key["public_key"]))
    public.verify(bytes.fromhex(head["signature"]), message)
    assert set(head) == {"size", "root_hash", "time", "key_id", "signature"}


async def test_every_event_is_proved_in_every_tree_over_http(runtime: Runtime, http: httpx.AsyncClient) -> None:
    roots = [EMPTY_ROOT]
    for _ in range(7):
        await _told(1)
        await grow(runtime)
        roots.append((await AuditTree.current()).growth().root)
    for size in range(1, 8):
        for seq in range(size):
            event = (await http.get(f"/v1/audit/events/{seq}")).json()
            proof = (await http.get("/v1/audit/proofs/inclusion", params={"seq": seq, "size": size})).json()
            assert (proof["leaf_index"], proof["size"]) == (seq, size)
            path = [bytes.fromhex(hash_) for hash_ in proof["path"]]
            assert proves_inclusion(bytes.fromhex(event["leaf_hash"]), seq, size, path, roots[size])
        for old in range(size + 1):
            proof = (await http.get("/v1/audit/proofs/consistency", params={"from": old, "to": size})).json()
            assert (proof["from"], proof["to"]) == (old, size)
            path = [bytes.fromhex(hash_) for hash_ in proof["path"]]
            assert proves_consistency(old, size, roots[old], roots[size], path)
    newest = (await http.get("/v1/audit/proofs/inclusion", params={"seq": 3})).json()
    assert newest["size"] == 7, "a head is signed for whoever asks about an event that none is over yet"
    assert (await http.get("/v1/audit/checkpoint")).json()["size"] == 7
    assert (await http.get("/v1/audit/proofs/consistency", params={"from": 2})).json()["to"] == 7


async def test_proofs_of_what_there_is_not_are_refused(runtime: Runtime, http: httpx.AsyncClient) -> None:
    await _told(3)
    await grow(runtime)
    for query, status in [
        ({"seq": 3}, 404), ({"seq": 0, "size": 4}, 422), ({"seq": 2, "size": 2}, 422), ({"seq": -1}, 422), ({"seq": "x"}, 422),
        ({}, 422), ({"seq": 10**30}, 422),
    ]:  # fmt: skip
        assert (await http.get("/v1/audit/proofs/inclusion", params=query)).status_code == status, query
    for query in ({}, {"from": 4}, {"from": 2, "to": 1}, {"from": 1, "to": 4}, {"from": 1, "to": 2, "too": 3}):
        assert (await http.get("/v1/audit/proofs/consistency", params=query)).status_code == 422, query


@pytest.mark.parametrize("form", ["ndjson", "csv"])
async def test_an_export_is_whole_and_holds_the_export_itself(
    runtime: Runtime, http: httpx.AsyncClient, form: str
) -> None:
    await enrolled(runtime, "ann")
    await _told(10, has_own_request_id=True)
    async with kept_up(runtime):
        answer = await http.get("/v1/audit/export")
        sheet = await http.get("/v1/audit/export", params={"format": "csv"})
    report = await _checked(answer)
    assert (report.findings, report.events) == ([], 12)
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert lines[-1]["action"] == "audit.export"
    shown = (await http.get("/v1/audit/events/3")).json()
    assert {name: lines[3][name] for name in shown} == shown
    assert shown["actor"]["name"] == "Aud Itor"
    report = await _checked(sheet)
    assert (report.findings, report.events) == ([], 13)


async def test_the_export_of_a_time_or_of_a_gallery_is_bound_and_still_proved(
    runtime: Runtime, http: httpx.AsyncClient
) -> None:
    await _told(3)
    for gallery in ("north", None, "south", "north", "north"):
        await _told(2, gallery=gallery)
        await asyncio.sleep(0.002)
    events = await AuditEvent.find_all().sort("+_id").to_list()
    async with kept_up(runtime):
        northern = await http.get("/v1/audit/export", headers={"Authorization": "Bearer northern"})
        window = {"after": events[4].time.isoformat(), "before": events[9].time.isoformat()}
        of_a_time = await http.get("/v1/audit/export", params=window)
        nothing = await http.get("/v1/audit/export", params={"after": "2100-01-01T00:00:00Z"})
        sheet = await http.get("/v1/audit/export", params={"after": "2100-01-01T00:00:00Z", "format": "csv"})
    lines = [json.loads(line) for line in northern.text.splitlines()]
    assert {line["gallery"] for line in lines} == {"north"}
    report = await _checked(northern, partial=True)
    assert (report.findings, report.events) == ([], 6)
    assert report.left_out[0] == (0, 3)
    assert (await _checked(northern)).findings, "only with --partial may events be left out"
    report = await _checked(of_a_time, partial=True)
    assert report.findings == []
    inside = [event for event in events if events[4].time <= event.time < events[9].time]
    assert [json.loads(line)["id"] for line in of_a_time.text.splitlines()] == [event.id for event in inside]
    report = await _checked(nothing, partial=True)
    assert (report.findings, report.events) == ([], 0)
    (empty,) = [json.loads(line) for line in nothing.text.splitlines()]
    assert {name for name, value in empty.items() if value is not None} == {"end"}
    assert report.head is not None
    assert report.left_out == [(0, report.head.size)]
    report = await _checked(sheet, partial=True)
    assert (report.findings, report.events) == ([], 0)


async def test_without_anybody_who_numbers_events_an_export_is_refused_soon(
    runtime: Runtime, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence, "NUMBERED_WITHIN_SECONDS", 0.2)
    answer = await http.get("/v1/audit/export")
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:idem:problem/not-ready")
    with pytest.raises(NotReady):
        await head_over(runtime, "nothing")


async def test_names_are_hashed_in_the_leaf_shown_while_they_are_kept_and_can_be_forgotten(
    runtime: Runtime, http: httpx.AsyncClient
) -> None:
    (mine,) = await _told(1, has_own_request_id=True)
    await _told(1)
    await record(None, by_system("sweep"), subject_kind="none", subject_id=None)
    await grow(runtime)
    before = {seq: (await http.get(f"/v1/audit/events/{seq}")).json() for seq in range(3)}
    assert before[0]["actor"] == {"kind": "user", "id": "auditor-1", "name": "Aud Itor", "ip": "192.0.2.1"}
    assert before[0]["request_id"] == before[1]["request_id"] == "request-0"
    assert mine.personal is not None
    salt = mine.personal.salt
    assert await AuditEvent.forget_personal({"subject.id": "ann"}) == 2
    assert await AuditEvent.forget_personal({"subject.id": "ann"}) == 0
    after = {seq: (await http.get(f"/v1/audit/events/{seq}")).json() for seq in range(3)}
    assert after[0]["actor"]["name"] == personal_hash(salt, "Aud Itor")
    assert after[0]["actor"]["ip"] == personal_hash(salt, "192.0.2.1")
    assert after[0]["request_id"] == personal_hash(salt, "request-0")
    assert after[1]["request_id"] == "request-0", "an id of ours is nobody's"
    assert after[2] == before[2], "the system has no name"
    stored = await AuditEvent.get_pymongo_collection().find_one({"_id": mine.id})
    assert "Aud Itor" not in str(stored)
    assert salt.hex() not in str(stored)
    assert len(await _numbered()) == 3, "the leaves still hold"
    async with kept_up(runtime):
        assert (await _checked(await http.get("/v1/audit/export"))).findings == []


async def test_h96_names_beside_an_event_that_its_leaf_does_not_bear_out_are_not_shown_and_found(
    runtime: Runtime, http: httpx.AsyncClient
) -> None:
    (event, _) = await _told(2, has_own_request_id=True)
    await grow(runtime)
    personal = event.personal
    assert personal is not None
    before = (await http.get("/v1/audit/events/0")).json()
    for field, hashed in {
        "actor_name": event.actor.name, "actor_ip": event.actor.ip, "request_id": event.request_id,
    }.items():  # fmt: skip
        await _set(event, {f"personal.{field}": "Mallory"})
        after = (await http.get("/v1/audit/events/0")).json()
        holder = after if field == "request_id" else after["actor"]
        assert holder[field.removeprefix("actor_")] == hashed
        assert "Mallory" not in str((await http.get("/v1/audit/events")).json())
        assert "log-name-changed" in (await check(runtime, lambda *_: None)).counts
        await _set(event, {"personal": personal.model_dump()})
    # Under another salt nothing is borne out; nor under one with a zero behind it, though HMAC makes no difference there.
    for salt in (b"", b"another salt....", personal.salt + b"\0"):
        await _set(event, {"personal.salt": salt})
        after = (await http.get("/v1/audit/events/0")).json()
        assert after["actor"] == before["actor"] | {"name": event.actor.name, "ip": event.actor.ip}
        assert after["request_id"] == event.request_id
    looked = await check(runtime, lambda *_: None)
    assert [(finding.kind, finding.subject) for finding in looked.findings] == [("log-name-changed", event.id)]
    assert "event 0: actor.name, actor.ip, request_id beside it" in looked.findings[0].message
    await _set(event, {"personal": personal.model_copy(update={"actor_name": "Mallory"}).model_dump()})
    async with kept_up(runtime):
        answer = await http.get("/v1/audit/export")
    assert (await _checked(answer)).findings == []
    assert "Mallory" not in answer.text
    assert json.loads(answer.text.splitlines()[0])["personal"]["fields"] == ["actor.ip", "request_id"]


async def test_h96_an_event_that_is_none_any_more_is_named_by_the_check(runtime: Runtime) -> None:
    events = await _told(3)
    await grow(runtime)
    await sign(runtime)
    await deliver(runtime)
    stored = await AuditEvent.get_pymongo_collection().find_one({"_id": events[1].id})
    assert stored is not None
    for forged in (
        {"leaf_hash": "no hex"}, {"leaf_hash": 7}, {"outcome": "perhaps"}, {"actor": 5}, {"personal": {"salt": 1}},
        {"detail": {"score": float("nan")}}, {"time": "never"}, {"outcome": "perhaps", "leaf_hash": ""},
    ):  # fmt: skip
        await _set(events[1], forged)
        looked = await check(runtime, lambda *_: None)
        changed = [finding for finding in looked.findings if finding.kind == "log-event-changed"]
        assert [finding.subject for finding in changed] == [events[1].id], forged
        assert "event 1 is not what" in changed[0].message
        assert looked.looked_at["events"] == 3
        await _set(events[1], stored)
    assert (await check(runtime, lambda *_: None)).findings == []


async def _set(event: AuditEvent, fields: dict[str, object]) -> None:
    await AuditEvent.get_pymongo_collection().update_one({"_id": event.id}, {"$set": fields})


async def test_an_auditor_fetches_keys_heads_and_an_export_and_proves_the_log_by_what_they_hold(
    runtime: Runtime, http: httpx.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of docs/audit.md."""
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(command, "_run", lambda _, work: asyncio.run_coroutine_threadsafe(work(runtime), loop).result())

    async def idem(*arguments: str) -> Result:
        return await asyncio.to_thread(CliRunner().invoke, command.app, list(arguments))

    export, fetched, printed = tmp_path / "audit.ndjson", tmp_path / "keys.json", tmp_path / "audit.keys"
    await _told(4)
    async with kept_up(runtime):
        export.write_bytes((await http.get("/v1/audit/export")).content)
    await deliver(runtime)
    (tmp_path / "checkpoint.json").write_bytes((await http.get("/v1/audit/checkpoint")).content)
    fetched.write_bytes((await http.get("/v1/audit/keys")).content)
    printed.write_text((await idem("key")).stdout)
    script = Path(__file__).parents[2] / "scripts" / "verify_audit.py"
    for keys, heads in ((fetched, runtime.settings.evidence_path), (printed, tmp_path / "checkpoint.json")):
        asked = [str(export), "--key", str(keys), "--heads", str(heads)]
        ended = await idem("verify", *asked)
        assert ended.exit_code == 0, ended.output
        assert "over 5 events" in ended.output
        alone = await asyncio.to_thread(subprocess.run, [sys.executable, "-I", script, *asked], capture_output=True)
        assert alone.returncode == 0, alone
        assert b"whole: every event as it was signed" in alone.stdout


async def test_names_are_forgotten_when_their_time_is_over(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    old, young = now() - timedelta(days=400), now() - timedelta(days=100)
    moments = iter([old, young, old - timedelta(days=1)])
    with monkeypatch.context() as patched:
        patched.setattr("app.audit.now", lambda: next(moments))
        events = await _told(3)
    await tend_log.tend(runtime)
    kept = [(await AuditEvent.get(event.id)).personal is not None for event in events]  # type: ignore[union-attr]
    assert kept == [False, True, False]
    runtime.settings.audit_personal_days = 50
    assert await tend_log.forget_old_names(runtime) == 1
    assert await tend_log.forget_old_names(runtime) == 0


def _stranger(name: str, ip: str = "198.51.100.7") -> Action:
    return Action(name=name, caller=None, request_id="r", ip=ip)


async def test_strangers_are_one_event_a_minute_at_once_and_a_count_of_the_rest(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    minute = now().replace(second=10, microsecond=0)
    with monkeypatch.context() as patched:
        patched.setattr("app.audit.now", lambda: minute)
        for name in ("audit.read", "audit.read", "auth.login", "auth.login", "auth.login"):
            await refuse(_stranger(name), Unauthenticated())
        await refuse(_stranger("audit.read", "198.51.100.8"), Unauthenticated())
    assert [event.action for event in await AuditEvent.find_all().sort("_id").to_list()] == ["audit.read", "audit.read"]
    await tend_log.tend(runtime)
    assert await AuditEvent.count() == 2, "the minute is not over"
    monkeypatch.setattr("app.audit.now", lambda: minute + timedelta(minutes=4))
    await tend_log.tend(runtime)
    await tend_log.tend(runtime)
    (told,) = await AuditEvent.find({"action": "auth.strangers"}).to_list()
    assert told.detail == {"refused": 5, "minute": f"{minute:%Y-%m-%dT%H:%MZ}", "actions": "audit.read 2, auth.login 3"}
    assert (told.outcome, told.actor.kind) == ("denied", "anonymous")
    assert told.personal is not None
    assert told.personal.actor_ip == "198.51.100.7"
    assert await StrangerCount.count() == 0
    await refuse(_stranger("audit.read"), Unauthenticated())
    assert await AuditEvent.find({"action": "audit.read"}).count() == 3, "the next minute begins anew"


async def test_refusals_of_known_callers_are_all_told_and_failed_reads_are_not(runtime: Runtime) -> None:
    del runtime
    for _ in range(2):
        await refuse(by_officer("identity.erase"), Forbidden())
    await refuse(by_officer("identity.erase"), NotFound())
    reading = by_officer("audit.read")
    reading.is_read = True
    await refuse(reading, NotFound())
    await refuse(reading, Forbidden())
    events = await AuditEvent.find_all().sort("_id").to_list()
    assert [(event.action, event.outcome) for event in events] == [
        ("identity.erase", "denied"), ("identity.erase", "denied"), ("identity.erase", "failure"), ("audit.read", "denied"),
    ]  # fmt: skip
    assert await Once.count() == 0


async def test_a_conflict_is_the_transactions_to_try_again_and_a_refusal_is_final(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    del runtime
    conflict = OperationFailure("conflict", 112, {"errorLabels": ["TransientTransactionError"]})
    refusal = OperationFailure("full", 14031)

    async def failing(*_: object) -> None:
        raise errors.pop()

    monkeypatch.setattr(AuditEvent, "enter", failing)
    errors = [conflict, ExecutionTimeout("late", 50), refusal]
    for expected in (AuditRefused, ExecutionTimeout, OperationFailure):
        with pytest.raises(expected) as raised:
            await record(None, by_system("x"), subject_kind="none", subject_id=None)
    assert raised.value is conflict


async def test_an_action_whose_idempotency_key_was_taken_over_does_not_happen(runtime: Runtime) -> None:
    action = by_officer("identity.enrol")
    ours, is_ours = await IdempotencyClaim.begin("key", b"f", timedelta(hours=1))
    assert is_ours
    action.claim = ours

    async def body(session: AsyncClientSession) -> None:
        await record(session, action, subject_kind="none", subject_id=None, status_code=201)

    await runtime.transaction(body)
    with pytest.raises(IdempotencyInProgress):
        await runtime.transaction(body)
    with pytest.raises(IdempotencyInProgress):
        await record(None, action, subject_kind="none", subject_id=None)
    assert action.actor_id == "officer-1"
    assert by_system("x").actor_id == "system"


async def test_a_new_key_signs_from_then_on_and_the_former_one_never_again(
    runtime: Runtime, http: httpx.AsyncClient
) -> None:
    await _told(2)
    await grow(runtime)
    first = await sign(runtime)
    former = await AuditKey.active()
    fresh = await runtime.transaction(
        lambda session: rotate_key(session, runtime.keys, by_system("audit.rotate_key"), "a restore")
    )
    second = await sign(runtime)
    assert (second.size, second.key_id, first.key_id) == (2, fresh.id, former.id)
    assert [key["key_id"] for key in (await http.get("/v1/audit/keys")).json()["keys"]] == [fresh.id, former.id]
    retired = await AuditKey.get(former.id)
    assert retired is not None
    assert (retired.sealed_private, retired.is_active) == (None, False)
    with pytest.raises(ValueError, match="was replaced"):
        retired.sign(runtime.keys, b"x")
    (event,) = await AuditEvent.find({"action": "audit.rotate_key"}).to_list()
    assert (event.subject.id, event.detail) == (fresh.id, {"former": former.id, "reason": "a restore"})
    async with kept_up(runtime):
        report = await _checked(await http.get("/v1/audit/export"), heads=[first.head, second.head])
    assert report.findings == []


async def test_an_event_that_no_leaf_could_hold_is_never_made(runtime: Runtime) -> None:
    del runtime
    with pytest.raises(ValueError, match="nan"):
        await record(None, by_system("x"), subject_kind="none", subject_id=None, detail={"score": float("nan")})
    assert await AuditEvent.count() == 0


async def test_the_root_and_the_proofs_of_a_large_log_are_a_few_reads(runtime: Runtime) -> None:
    """A slice of `python -m tests.support.audit_load`, which does the same with 100,000 events."""
    del runtime
    await audit_load.filled(3000)
    told = await audit_load.proofs(3000, asked=10)
    assert told.longest_path <= 12
    assert told.root_ms < 1000


async def test_h93_h97_an_evidence_folder_without_room_is_no_reason_to_lose_a_head(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _told(1)
    await grow(runtime)
    await sign(runtime)

    async def full(_: FolderEvidence, name: str, data: bytes) -> None:
        del name, data
        message = "No space left on device"
        raise EvidenceUnavailable(message)

    with monkeypatch.context() as patched:
        patched.setattr(type(runtime.evidence), "append", full)
        assert await deliver(runtime) == 1
    assert await deliver(runtime) == 0
    assert len(await runtime.evidence.names("heads/")) == 1


async def test_problems_of_the_log_have_the_contracts_slug() -> None:
    problem: Problem = AuditRefused()
    assert (problem.slug(), problem.status) == ("dependency-unavailable", 503)
