"""Heads and keys outside of the database: what a restore and a check make of their names, however many and strange they are."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.audit import by_system, record, rotate_key
from app.documents.base import now
from app.documents.tree import AuditKey, AuditTree, KeptHead, TreeHead, TreeNode
from app.heads_outside import DAYS_BACK, heads_outside, misfits_outside
from app.runtime import Runtime
from app.use_cases import sequence
from storage.evidence import EvidenceStore, FolderEvidence

NOON = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)


async def logged(runtime: Runtime, count: int) -> AuditTree:
    """So many events in the tree."""
    for _ in range(count):
        await record(None, by_system("x"), subject_kind="none", subject_id=None)
    while await sequence.grow(runtime):
        pass
    return await AuditTree.current()


async def kept(runtime: Runtime, tree: AuditTree, key: AuditKey, time: datetime) -> str:
    """A head over the tree as it was, signed by that key, kept outside; its name."""
    name, data = TreeHead.signed(tree, key, runtime.keys, time).evidence
    await runtime.evidence.append(name, data)
    return name


async def by_name(runtime: Runtime, evidence: EvidenceStore | None = None) -> list[str]:
    """What the names alone contradict."""
    tree = await AuditTree.current()
    return (await heads_outside(evidence or runtime.evidence, tree.size, lambda *_: None)).misfits


def test_only_what_a_head_is_named_is_taken_for_one() -> None:
    name = "heads/2026-11-21/120000000-000000000042-0123456789abcdef.json"
    assert KeptHead.named(name) == KeptHead(name, 42, "0123456789abcdef")
    for other in ("heads/README.txt", "heads/2026-11-21/x.json", name.replace("0042", "00x2"), name[:-1], f"x{name}"):
        assert KeptHead.named(other) is None


async def test_a_strange_name_is_told_and_holds_up_neither_restore_nor_check(runtime: Runtime) -> None:
    tree = await logged(runtime, 3)
    await kept(runtime, tree, await AuditKey.active(), NOON)
    assert await misfits_outside(runtime.evidence, tree) == []
    for name in ("heads/README.txt", "heads/2026-11-21/note", "heads/zebra/x.json"):
        await runtime.evidence.append(name, b"who was here")
    assert await misfits_outside(runtime.evidence, tree) == [
        "heads/README.txt is no tree head, nor are 2 more names there"
    ]
    assert await by_name(runtime) == ["heads/README.txt is no tree head, nor are 2 more names there"]


@pytest.mark.parametrize("forged", [b"", b"[" * 100_000, b"{}", b"another"])
async def test_a_head_that_is_none_or_another_is_told(runtime: Runtime, forged: bytes) -> None:
    tree, key = await logged(runtime, 3), await AuditKey.active()
    head = TreeHead.signed(tree, key, runtime.keys, NOON)
    later = TreeHead.signed(tree, key, runtime.keys, NOON + timedelta(seconds=1))
    name = later.evidence[0]
    await runtime.evidence.append(name, head.evidence[1] if forged == b"another" else forged or b"-")
    told = f"{name} holds the head of another time, size or key" if forged == b"another" else f"{name} is no tree head"
    assert await misfits_outside(runtime.evidence, tree) == [told]


async def test_a_head_by_an_unknown_key_or_with_a_wrong_signature_is_told(runtime: Runtime) -> None:
    tree, key = await logged(runtime, 3), await AuditKey.active()
    stranger = AuditKey.fresh(runtime.keys)
    name = await kept(runtime, tree, stranger, NOON)
    assert await misfits_outside(runtime.evidence, tree) == [
        f"{name} is signed by key {stranger.id}, which the store does not know"
    ]
    await AuditKey.get_pymongo_collection().update_one({"_id": key.id}, {"$set": {"public": bytes(32)}})
    name = await kept(runtime, tree, key, NOON + timedelta(seconds=1))
    assert await misfits_outside(runtime.evidence, tree) == [f"{name} does not bear the signature of its key"]


async def test_nodes_that_are_gone_are_told_and_do_not_hold_up_a_restore(runtime: Runtime) -> None:
    tree = await logged(runtime, 4)
    name = await kept(runtime, tree, await AuditKey.active(), NOON)
    await TreeNode.get_pymongo_collection().delete_many({})
    assert await misfits_outside(runtime.evidence, tree) == [
        f"the first 4 events are not those that {name} was signed over"
    ]


async def test_a_restore_lists_the_newest_day_and_the_one_of_its_own_last_head(
    runtime: Runtime, tmp_path: Path
) -> None:
    tree, key = await logged(runtime, 3), await AuditKey.active()
    for age in range(40):
        size = 3 if age >= 20 else 3 + 20 - age
        name = f"{KeptHead.names_at(f'{NOON - timedelta(days=age):%Y-%m-%dT%H:%M:%S}.000Z')}-{size:012d}-{key.id}.json"
        await runtime.evidence.append(name, b"-")
    old = await kept(runtime, tree, key, NOON - timedelta(days=25) + timedelta(seconds=1))
    listed: list[str] = []

    class Watched(FolderEvidence):
        async def names(self, prefix: str = "") -> list[str]:
            listed.append(prefix)
            return await super().names(prefix)

    evidence = Watched(tmp_path / "evidence")
    told = await misfits_outside(evidence, tree.model_copy(update={"signed_at": NOON - timedelta(days=25)}))
    assert len(told) == 1
    assert told[0].endswith("events 3 to 22 are lost")
    assert listed == [f"heads/{NOON:%Y-%m-%d}/", old.rpartition("/")[0] + "/"]
    listed.clear()
    assert await misfits_outside(evidence, tree) == told, "where no head was ever signed, the newest days are all"
    assert len(listed) == DAYS_BACK
    await evidence.close()


async def test_h100_honest_heads_of_restored_logs_are_no_finding_and_a_log_set_back_is(runtime: Runtime) -> None:
    """Two restores of one backup, and one of a backup of later: each leaves heads behind over events that are lost."""
    first = await AuditKey.active()
    backup = await logged(runtime, 2)
    start = now() - timedelta(hours=6)
    await kept(runtime, backup, first, start)
    beyond = backup.model_copy(update={"size": 9, "peaks": [bytes(32), bytes(32)]})
    await kept(runtime, beyond, first, start + timedelta(hours=1))
    forgotten = AuditKey.fresh(runtime.keys)  # of the first restore, which the second one's backup does not know
    for size, hours in ((4, 2), (7, 3)):
        on = backup.model_copy(update={"size": size, "peaks": [bytes(32)] * size.bit_count()})
        await kept(runtime, on, forgotten, start + timedelta(hours=hours))
    (told,) = await misfits_outside(runtime.evidence, backup)
    assert "events 2 to 6 are lost" in told

    async def noted(session: object) -> None:
        await rotate_key(session, runtime.keys, by_system("audit.rotate_key"), "a backup was restored")  # type: ignore[arg-type]
        detail: dict[str, str | int | float | bool | None] = {"log_size": backup.size}
        await record(
            session,  # type: ignore[arg-type]
            by_system("backup.restore"), subject_kind="backup", subject_id="x", detail=detail,
        )  # fmt: skip

    assert len(await by_name(runtime)) == 2
    await runtime.transaction(noted)
    grown, active = await logged(runtime, 1), await AuditKey.active()
    await kept(runtime, beyond, first, now() + timedelta(minutes=10))  # by a host whose clock was ahead
    await kept(runtime, grown, active, now())
    assert await by_name(runtime) == []
    larger = grown.model_copy(update={"size": 6, "peaks": [bytes(32)] * 2})
    await kept(runtime, larger, active, now() + timedelta(seconds=1))
    (told,) = await by_name(runtime)
    assert "the log ends after 5 events" in told


async def test_public_keys_are_kept_outside_before_the_heads_that_they_sign(runtime: Runtime) -> None:
    first = await AuditKey.active()
    await logged(runtime, 1)
    await sequence.sign(runtime)
    assert await sequence.deliver(runtime) == 0
    second = await runtime.transaction(
        lambda session: rotate_key(session, runtime.keys, by_system("audit.rotate_key"), "why not")
    )
    await sequence.deliver(runtime)
    for key in (first, second):
        assert await runtime.evidence.read(f"keys/{key.id}.txt") == f"{key.id} {key.public.hex()}\n".encode()
    assert await AuditKey.undelivered() == []
