"""Check: whether MongoDB, the photos and the index agree, and mend what is derived from the documents.

Documents are read as they stood at one moment, so what is written meanwhile disturbs nothing; a photo that is missed is looked
for once more in the documents of now. What is mended: counts, lost outbox entries, photos that nobody names, index files that are
to be written anew. People, verdicts and events are never touched.
"""

import asyncio
import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, Final

import pymongo
from pymongo.asynchronous.client_session import AsyncClientSession

from app.backups import Tell, history_kept, in_groups
from app.documents.audiences import AudienceClaim
from app.documents.base import now
from app.documents.cases import Case, Pair
from app.documents.deletions import Deletion
from app.documents.events import AuditEvent
from app.documents.galleries import Gallery, GalleryChange
from app.documents.identities import Identity, ReferenceHashes, Sample
from app.documents.restores import Restore
from app.documents.sealed import LOOKUP_RULES, data_key, gallery_key, open_attributes, open_photo, open_template
from app.documents.tree import AuditTree, KeptHead
from app.domain.log_export import canonical
from app.domain.merkle import Growth, leaf_hash
from app.heads_outside import HeadsOutside, heads_outside, misfit_of
from app.kept_outside import lost, write_again
from app.keys import DataKey, SealBroken
from app.orphans import ORPHAN_AGE, known_galleries, old_keys, sorted_by_owner
from app.runtime import Runtime
from storage.evidence import EvidenceUnavailable
from storage.generations import BadGeneration, GenerationStoreUnavailable
from storage.photos import PhotoNotFound

#: Nobody waits for an answer here; a store that is away for longer ends it.
CHECK_SECONDS: Final = 6 * 3600
PEOPLE_AT_ONCE: Final = 500
ROWS_AT_ONCE: Final = 2000
#: Of one kind that are told one by one; all are counted.
LISTED: Final = 200
#: Events get their number within a second as long as a worker runs.
NUMBERED_WITHIN: Final = timedelta(minutes=1)
_HASH: Final = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that does not fit. kind: stable, for programs; subject: the id or key that it is about."""

    kind: str
    gallery: str | None
    subject: str | None
    message: str
    is_mended: bool = False


@dataclass(slots=True)
class Checked:
    """What was looked at, by kind; what was found: how often each kind, and the first of each; how many still stand."""

    looked_at: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    standing: int = 0

    def add(self, finding: Finding) -> None:
        """Keep what was found."""
        self.counts[finding.kind] += 1
        self.standing += not finding.is_mended
        if self.counts[finding.kind] <= LISTED:
            self.findings.append(finding)


async def check(runtime: Runtime, tell: Tell, *, repair: bool = False, photos: bool = True) -> Checked:
    """Compare everything with everything. photos: read each of them, too; else only what names them."""
    with pymongo.timeout(CHECK_SECONDS):
        return await _check(runtime, tell, repair=repair, photos=photos)


async def _check(runtime: Runtime, tell: Tell, *, repair: bool, photos: bool) -> Checked:
    # Before the moment that MongoDB is asked to remember: a bucket takes its time to list years of heads.
    outside = await heads_outside(runtime.evidence, (await AuditTree.current()).size, tell)
    async with history_kept(runtime.mongo), runtime.mongo.start_session(snapshot=True) as session:
        one = _Looking(runtime, session, tell, repair, photos, Checked())
        galleries = [gallery async for gallery in Gallery.find_all(session=session)]
        for gallery in galleries:
            await one.gallery(gallery)
        await one.audiences()
        await one.erasures()
        await one.look_alikes()
        await one.log(outside)
        for gallery in galleries:
            await one.index(gallery)
        await one.places()
        if photos:
            await one.orphans()
        await one.evidence()
        await one.restore()
    return one.found


@dataclass(frozen=True, slots=True)
class _Named:
    """A photo that a sample names, with what opens it."""

    identity: Identity
    sample: Sample
    key: DataKey


@dataclass(slots=True)
class _Looking:
    runtime: Runtime
    session: AsyncClientSession
    tell: Tell
    repair: bool
    photos: bool
    found: Checked

    def _find(
        self, kind: str, gallery: Gallery | None, subject: str | None, message: str, *, is_mended: bool = False
    ) -> None:
        self.found.add(Finding(kind, None if gallery is None else gallery.name, subject, message, is_mended))

    async def gallery(self, gallery: Gallery) -> None:
        """The gallery's people, with what they are counted, ordered and found by."""
        try:
            gallery_key(self.runtime.keys, gallery)
        except SealBroken as error:
            self._find("gallery-key", gallery, gallery.id, f"the gallery's key does not open: {error}")
            return
        people = samples = done = 0
        async for some in self._people(gallery):
            rows = await self._rows_of(gallery, some)
            for identity in some:
                people, samples = people + 1, samples + len(identity.samples)
                self._against_rows(gallery, identity, rows[identity.id])
                await self._outbox(gallery, identity)
                await self._lookups(gallery, identity)
            await self._sealed(gallery, some)
            done += len(some)
            self.tell(f"{gallery.name}: people", done, max(done, gallery.identities))
        self.found.looked_at += Counter(identities=people, samples=samples)
        removed = await self._changes(gallery)
        await self._counts(gallery, {"identities": people, "samples": samples, "removed": removed})

    async def audiences(self) -> None:
        """Each audience belongs to the client that has it. An admin decides; nothing is taken from a client here."""
        for audience, owner, clients in await AudienceClaim.contested(self.session):
            whose = "nobody may use it" if owner is None else f"only {owner} may use it"
            told = f"clients {', '.join(clients)} have it, and {whose}: leave it to one client"
            self._find("audience-contested", None, audience, told)

    async def erasures(self) -> None:
        """Whoever is erased is gone, and stays so."""
        erased = {"status": "erased"}
        left = {**erased, "$or": [{"wrapped_key": {"$ne": None}}, {"samples.0": {"$exists": True}}]}
        async for row in Identity.get_pymongo_collection().find(left, {"_id": 1}, session=self.session):
            self._find("erasure-unfinished", None, row["_id"], "erased, and still has a key or samples")
        ids: list[str] = []
        async for row in Deletion.get_pymongo_collection().find({}, {"_id": 1}, session=self.session):
            self.found.looked_at["erasures"] += 1
            ids.append(row["_id"])
            if len(ids) == ROWS_AT_ONCE:
                await self._risen(ids)
                ids = []
        await self._risen(ids)

    async def look_alikes(self) -> None:
        """Pairs and open cases point at people who are there."""
        pairs = Pair.get_pymongo_collection().find({}, {"low": 1, "high": 1}, session=self.session)
        async for some in in_groups(pairs, ROWS_AT_ONCE):
            self.found.looked_at["pairs"] += len(some)
            await self._pointing("pair", {row["_id"]: [row["low"], row["high"]] for row in some}, living=True)
        cases = Case.find({"state": "open"}, session=self.session)
        async for opened in in_groups(aiter(cases), PEOPLE_AT_ONCE):
            self.found.looked_at["cases"] += len(opened)
            newcomers = {case.id: [case.newcomer_id] for case in opened}
            await self._pointing("case", newcomers, living=True)
            candidates = {case.id: [candidate.identity_id for candidate in case.candidates] for case in opened}
            await self._pointing("case", candidates, living=False)

    async def log(self, outside: HeadsOutside) -> None:
        """Every event has its number and its leaf, the tree is that of the leaves, and bears out the heads kept outside."""
        tree, growth, done = await AuditTree.current(self.session), Growth(), 0
        for misfit in outside.misfits:
            self._find("log-head", None, None, misfit)
        # Their roots come from the events themselves: the tree's own nodes may have been left as they were.
        roots = dict.fromkeys((head.size for head in outside.last), growth.root)
        # As they lie there: an event that was changed may be none any more.
        numbered = AuditEvent.get_pymongo_collection().find({"seq": {"$type": "number"}}, session=self.session)
        async for events in in_groups(aiter(numbered.sort("seq")), PEOPLE_AT_ONCE):
            for event in events:
                seq = growth.size
                if event["seq"] != seq:
                    told = f"event {seq} is missing: {event['seq']} comes in its place"
                    self._find("log-hole", None, str(seq), told)
                    return
                growth.add(self._leaf(event, seq))
                if growth.size in roots:
                    roots[growth.size] = growth.root
            done += len(events)
            self.tell("events", done, max(done, tree.size))
        self.found.looked_at["events"] += done
        if growth.size != tree.size:
            self._find("log-cut", None, None, f"the tree has {tree.size} leaves, and {growth.size} events are there")
        elif growth.peaks != list(tree.peaks):
            self._find("log-tree", None, None, "the tree is not that of the events")
        await self._unnumbered()
        await self._heads(outside.last, roots)

    def _leaf(self, row: Mapping[str, Any], seq: int) -> bytes:
        """The leaf that an event states; the event is what that was hashed over, and so is what lies beside it."""
        hashed, stated = b"", row.get("leaf_hash")
        with suppress(ValueError):  # of what is no event, or has no place in a leaf
            event = AuditEvent.model_validate(row)
            hashed = leaf_hash(canonical(event.leaf(seq)))
            kept = {} if event.personal is None else event.personal.clear
            if untrue := [name for name in kept if name not in event.borne_out]:
                told = f"event {seq}: {', '.join(untrue)} beside it is not what its leaf was hashed over"
                self._find("log-name-changed", None, event.id, told)
        if not hashed or hashed.hex() != stated:
            told = f"event {seq} is not what its leaf was hashed over"
            self._find("log-event-changed", None, str(row["_id"]), told)
        # The tree tells which of the two was changed.
        is_hash = isinstance(stated, str) and _HASH.fullmatch(stated)
        return bytes.fromhex(str(stated)) if is_hash else hashed

    async def index(self, gallery: Gallery) -> None:
        """The published files are what was published, and not ahead of the documents."""
        await self._purged(gallery)
        published = gallery.published
        if published is None:
            return
        self.found.looked_at["generations"] += 1
        self.tell(f"{gallery.name}: index", 0, 1)
        fault = None if gallery.fault is None else gallery.fault.reason
        if fault is None and published.watermark > gallery.seq:
            fault = f"it reaches to change {published.watermark}, and the gallery only to {gallery.seq}"
        if fault is None:
            store = self.runtime.search.store
            try:
                wanted = (gallery.id, gallery.epoch, published.number, published.digest)
                await self.runtime.share.run_long("verify", partial(store.verify, *wanted))
            except (BadGeneration, GenerationStoreUnavailable) as error:
                fault = str(error)
        # Published anew meanwhile, and the former files are gone: then nothing is wrong with what counts.
        head = await Gallery.get(gallery.id)
        if fault is not None and head is not None and head.published == published:
            if self.repair:
                await head.report(published.number, fault)  # whoever publishes takes it from there
            told = f"generation {published.number}: {fault}"
            self._find("index-generation", gallery, gallery.id, told, is_mended=self.repair)
        self.tell(f"{gallery.name}: index", 1, 1)

    async def _purged(self, gallery: Gallery) -> None:
        """Index files with an erased person are gone in time, also those of a gallery that has no index since."""
        head = await Gallery.get(gallery.id)
        if head is not None and head.purge_by is not None and head.purge_by < now():
            due = f"{head.purge_by:%Y-%m-%d %H:%M} UTC"
            self._find(
                "index-purge-late", gallery, gallery.id, f"files that hold somebody erased should be gone since {due}"
            )

    async def orphans(self) -> None:
        """A document names every photo in the store. Photos that may belong to another store are reported, never deleted."""
        if self.repair:
            await self.runtime.places.require_photos()
        galleries, done = await known_galleries(), 0
        async for keys in old_keys(self.runtime.photos, age=ORPHAN_AGE, size=PEOPLE_AT_ONCE):
            done += len(keys)
            self.tell("photos in the store", done, done)
            found = await sorted_by_owner(keys, galleries)
            # With a wrong clock, a photo may look old although its document is about to be committed. During a restore, the
            # backup that is being loaded may name the photo.
            is_mended = self.repair and self.runtime.clock.may_erase and await Restore.standing() is None
            if is_mended and found.orphans:
                await self.runtime.photos.delete(found.orphans)
            for key in found.orphans:
                self._find("photo-orphan", None, key, "no document names this photo", is_mended=is_mended)
            for key in found.foreign:
                if not self.runtime.places.is_own_key(key):
                    self._find(
                        "photo-foreign", None, key, "nothing proves that it belongs to this store; left unchanged"
                    )

    async def places(self) -> None:
        """Every place belongs to this store, and contains nothing else."""
        self.runtime.search.store.remember(await known_galleries())
        for standing in await self.runtime.places.standings():
            # After a restore on another machine, the former store owns the evidence until it is adopted: that is no fault.
            is_lost = standing.is_refused or standing.state == "emptied"
            if is_lost and not standing.setting.startswith("EVIDENCE"):
                self._find("place-foreign", None, standing.setting, standing.sentence)
        for name in await self.runtime.share.run(self.runtime.search.store.strangers):
            self._find("index-foreign", None, name, "it is not an index file of this store; left unchanged")

    async def evidence(self) -> None:
        """The evidence store has everything that must survive a loss of the database."""
        try:
            async for one in lost(self.runtime.evidence, self.runtime.keys):
                if self.repair:
                    await write_again(self.runtime.evidence, one)
                told = "it is missing from the evidence store"
                self._find("evidence-missing", None, one.name, told, is_mended=self.repair)
        except EvidenceUnavailable as error:
            self._find("evidence-away", None, None, f"the evidence store cannot be compared: {error}")

    async def restore(self) -> None:
        """No restore was left half done."""
        standing = await Restore.standing()
        if standing is not None:
            message = (
                f"the restore of {standing.set_id} stopped at {standing.state}: let it come to its end, or abandon it"
            )
            self._find("restore-unfinished", None, standing.set_id, message)

    async def _unnumbered(self) -> None:
        """No event waits for its number for long."""
        late = {"seq": None, "time": {"$lt": now() - NUMBERED_WITHIN}}
        if waiting := await AuditEvent.get_pymongo_collection().find(late, {"_id": 1}).to_list(LISTED):
            told = f"{len(waiting)} events or more wait for their number: is a worker running?"
            self._find("log-unnumbered", None, waiting[0]["_id"], told)

    async def _heads(self, heads: Sequence[KeptHead], roots: Mapping[int, bytes]) -> None:
        """Heads outside are signed over the events that are there; of many the last of each day."""
        for head in heads:
            wrong = await misfit_of(self.runtime.evidence, head, roots[head.size])
            if wrong is not None:
                self._find("log-head", None, None, wrong)
        self.found.looked_at["tree heads"] += len(heads)

    async def _people(self, gallery: Gallery) -> AsyncIterator[list[Identity]]:
        living = {"gallery_id": gallery.id, "status": {"$ne": "erased"}}
        people = Identity.find(living, session=self.session)
        async for some in in_groups(aiter(people), PEOPLE_AT_ONCE):
            yield some

    async def _rows_of(self, gallery: Gallery, people: Sequence[Identity]) -> dict[str, dict[str, int]]:
        """The seqs of the rows that brought these people's samples in, by identity and sample."""
        found: defaultdict[str, dict[str, int]] = defaultdict(dict)
        query = {"gallery_id": gallery.id, "identity_id": {"$in": [identity.id for identity in people]}, "kind": "add"}
        async for row in GalleryChange.get_pymongo_collection().find(query, session=self.session):
            found[row["identity_id"]][row["sample_id"]] = row["seq"]
        return found

    def _against_rows(self, gallery: Gallery, identity: Identity, rows: dict[str, int]) -> None:
        """The samples, and the rows by which they are found, are the same."""
        for sample in identity.samples:
            seq = rows.pop(sample.id, None)
            if seq != sample.seq:
                told = (
                    "no change brings it into a search"
                    if seq is None
                    else f"change {seq} brings it in, not {sample.seq}"
                )
                self._find("change-missing", gallery, identity.id, f"sample {sample.id}: {told}")
        for sample_id, seq in rows.items():
            self._find(
                "change-unknown", gallery, identity.id, f"change {seq} brings in sample {sample_id}, which is not there"
            )

    async def _outbox(self, gallery: Gallery, identity: Identity) -> None:
        """Whoever waits for a verdict is waited for."""
        waits = any(screening.state in {"queued", "running"} for screening in identity.screenings)
        if not waits or identity.outbox_at is not None or identity.status not in {"pending", "active"}:
            return
        if self.repair:
            mine = {"_id": identity.id, "version": identity.version, "outbox_at": None}
            await Identity.get_pymongo_collection().update_one(mine, {"$set": {"outbox_at": now()}})
        told = "a screening is due, and no sweep would find it"
        self._find("outbox-missing", gallery, identity.id, told, is_mended=self.repair)

    async def _lookups(self, gallery: Gallery, identity: Identity) -> None:
        """Everybody is found by today's rules of spelling, and nobody else has the same reference."""
        if identity.attributes is not None and LOOKUP_RULES not in identity.name_tags:
            told = "its name and reference are looked up by older rules; a worker renews them within the hour"
            self._find("lookup-outdated", gallery, identity.id, told)
        if identity.external_ref_equal is not None:
            wanted = ReferenceHashes(identity.external_ref_equal, identity.external_ref_equal)
            found = await Identity.with_reference({gallery.id: wanted}, self.session)
            if others := sorted(one.id for one in found if one.id != identity.id):
                told = f"{', '.join(others)} has the same reference in another spelling; change one of them"
                self._find("reference-twice", gallery, identity.id, told)

    async def _sealed(self, gallery: Gallery, people: Sequence[Identity]) -> None:
        """Templates, attributes and photos open."""
        named: list[_Named] = []
        for identity in people:
            try:
                key = data_key(self.runtime.keys, gallery, identity)
                if identity.attributes is not None:
                    open_attributes(key, identity.attributes, gallery.id, identity.id)
            except (SealBroken, ValueError) as error:
                self._find("attributes-broken", gallery, identity.id, str(error)[:200])
                continue
            for sample in identity.samples:
                try:
                    if not sample.is_lost:
                        open_template(key, gallery.id, identity.id, sample)
                except SealBroken as error:
                    self._find("template-broken", gallery, identity.id, f"sample {sample.id}: {error}")
                named.append(_Named(identity, sample, key))
        if self.photos:
            for first in range(0, len(named), 8):
                await asyncio.gather(*(self._photo(gallery, one) for one in named[first : first + 8]))

    async def _photo(self, gallery: Gallery, one: _Named) -> None:
        """A photo is there, and the one that was stored."""
        identity, sample = one.identity, one.sample
        try:
            sealed = await self.runtime.photos.get(sample.photo_key)
            await self.runtime.compute(open_photo, one.key, sealed, gallery.id, identity.id, sample.id)
        except PhotoNotFound:
            known = await Identity.living(identity.id)
            if known is None or sample.id not in {sample.id for sample in known.samples}:
                return  # erased in the meantime
            self._find("photo-missing", gallery, identity.id, f"the photo of sample {sample.id} is not in the store")
        except SealBroken:
            self._find(
                "photo-broken", gallery, identity.id, f"the photo of sample {sample.id} is not the one that was stored"
            )
        else:
            self.found.looked_at["photos"] += 1

    async def _changes(self, gallery: Gallery) -> int:
        """The gallery's changes are without a hole, and bring in nobody who is not there; how many take somebody out."""
        fields = {"_id": 0, "seq": 1, "kind": 1, "identity_id": 1}
        rows = GalleryChange.get_pymongo_collection().find({"gallery_id": gallery.id}, fields, session=self.session)
        expected, removed = 1, 0
        async for some in in_groups(rows.sort("seq"), ROWS_AT_ONCE):
            for row in some:
                if row["seq"] != expected:
                    holes = (
                        f"change {expected}"
                        if row["seq"] == expected + 1
                        else f"changes {expected} to {row['seq'] - 1}"
                    )
                    self._find(
                        "change-hole",
                        gallery,
                        gallery.id,
                        f"{holes} are missing: no search of this gallery can be answered",
                    )
                expected = row["seq"] + 1
                removed += row["kind"] == "remove"
            added = sorted({row["identity_id"] for row in some if row["kind"] == "add"})
            statuses = await Identity.statuses(added, self.session)
            for identity_id in added:
                if statuses.get(identity_id, "erased") == "erased":
                    self._find("change-unknown", gallery, identity_id, "a change brings in somebody who is not there")
            self.tell(f"{gallery.name}: changes", expected - 1, max(expected - 1, gallery.seq))
        self.found.looked_at["changes"] += expected - 1
        if expected - 1 != gallery.seq:
            self._find(
                "change-hole", gallery, gallery.id, f"the changes end at {expected - 1}, the gallery at {gallery.seq}"
            )
        return removed

    async def _counts(self, gallery: Gallery, actual: dict[str, int]) -> None:
        wrong = {
            name: count - getattr(gallery, name) for name, count in actual.items() if count != getattr(gallery, name)
        }
        for name, difference in wrong.items():
            told = f"{name}: {actual[name]} are there, {getattr(gallery, name)} are counted"
            if self.repair:  # by the difference: whatever was counted since stays counted
                counts = Gallery.get_pymongo_collection()
                await counts.update_one({"_id": gallery.id}, {"$inc": {name: difference}})
            self._find("count", gallery, gallery.id, told, is_mended=self.repair)

    async def _risen(self, ids: Sequence[str]) -> None:
        statuses = await Identity.statuses(ids, self.session)
        for identity_id in (id_ for id_, status in statuses.items() if status != "erased"):
            self._find("erased-living", None, identity_id, "the ledger knows this person as erased: delete them again")

    async def _pointing(self, kind: str, sides: dict[str, list[str]], *, living: bool) -> None:
        """These documents point at people who are known, and not erased where they must not be."""
        statuses: dict[str, Any] = dict(
            await Identity.statuses(sorted({one for ids in sides.values() for one in ids}), self.session)
        )
        for id_, ids in sides.items():
            for one in ids:
                status = statuses.get(one)
                if status is None or (living and status == "erased"):
                    what = "unknown" if status is None else "erased"
                    self._find(f"{kind}-dangling", None, id_, f"it points at {one}, who is {what}")
