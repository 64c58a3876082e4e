"""The wiring, once: what a process owns, opened and closed together. Every door gets the same Runtime."""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar
from weakref import WeakValueDictionary

import cv2
import faiss
import pymongo
import structlog
from beanie import Document, init_beanie
from pymongo import AsyncMongoClient
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import DuplicateKeyError
from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import ReadPreference
from pymongo.write_concern import WriteConcern

from app.access.backoff import Backoff
from app.access.callers import Access, open_access
from app.access.passwords import PasswordPool
from app.boundary import Boundaries, BoundedEvidence, BoundedMongoClient, BoundedPhotos
from app.clock import Clock
from app.config import Settings, UnsafeProduction
from app.documents import (
    accounts,
    audiences,
    budgets,
    cases,
    challenges,
    claims,
    deletions,
    events,
    failed_logins,
    galleries,
    heartbeats,
    identities,
    leases,
    probes,
    proposals,
    removals,
    renewals,
    restores,
    scans,
    stores,
    tree,
)
from app.documents.base import go_by, new_id
from app.documents.galleries import DEFAULT_GALLERY, Gallery
from app.documents.migrations import migrate
from app.documents.root_secret import RootSecret, open_root
from app.documents.sealed import data_key, open_photo
from app.domain.photo import NoRoomYet, PhotoReader, giving_way
from app.domain.policy import GalleryPolicy
from app.engine.opening import open_engine, open_reader
from app.engine.port import FaceEngine
from app.errors import DependencyUnavailable, ModelMismatch, NotReady, PhotoMissing, Problem
from app.fair_executor import FairExecutor, TooMuchWaits
from app.keys import KeyRing, SealBroken
from app.limits import RateLimits
from app.ownership import OwnedEvidence, Places, guards_of, owner_of
from app.probing import Probing
from app.processors import processors
from app.queue import Queue
from app.restoring import admitted, application_name, leaving_for_a_restore
from app.search import Limits, Search
from app.share import Share
from storage.evidence import BucketEvidence, EvidenceStore, EvidenceUnavailable, FolderEvidence
from storage.generations import GenerationStore, drop_generations_below
from storage.photos import LocalPhotoStore, MinioPhotoStore, PhotoNotFound, PhotoStore

log = structlog.get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

COMPUTE_NICENESS = 5
LAST_CHANCE_SECONDS = 0.25
#: Short steps that may wait: each takes some milliseconds.
MOST_SHORT_WAITING = 1024
#: What the first start of a version may take to migrate documents and build new indexes. MongoDB gives up an index whose time is
#: over, so a limit that is too short would never let a large store start.
PREPARING_SECONDS = 3600
#: How long a starting process waits for the owner's mark of a place.
LOOK_SECONDS = 5.0

DOCUMENTS: list[type[Document]] = [
    RootSecret,
    *accounts.ACCOUNT_DOCUMENTS,
    audiences.AudienceClaim,
    galleries.Gallery,
    galleries.GalleryChange,
    identities.Identity,
    deletions.Deletion,
    proposals.IdentityProposal,
    removals.SampleRemoval,
    cases.Case,
    cases.Pair,
    events.AuditEvent,
    events.StrangerCount,
    *tree.TREE_DOCUMENTS,
    claims.IdempotencyClaim,
    claims.Once,
    challenges.Challenge,
    probes.Probe,
    renewals.Renewal,
    budgets.FaceBudget,
    budgets.NonMatches,
    budgets.Erasures,
    budgets.UnknownNames,
    budgets.Finds,
    budgets.PeopleRead,
    failed_logins.FailedLogins,
    leases.Lease,
    heartbeats.Heartbeat,
    restores.Restore,
    *scans.SCAN_DOCUMENTS,
    stores.Store,
    stores.EnrolmentBegun,
]


@dataclass(slots=True)
class Runtime:
    """What a process owns."""

    settings: Settings
    mongo: AsyncMongoClient[dict[str, object]]
    engine: FaceEngine
    engine_reason: str
    photos: PhotoStore
    evidence: EvidenceStore
    keys: KeyRing
    queue: Queue
    access: Access
    boundaries: Boundaries
    clock: Clock
    places: Places
    passwords: PasswordPool = field(init=False)
    reader: PhotoReader = field(init=False)
    backoff: Backoff = field(init=False)
    probing: Probing = field(init=False)
    limits: RateLimits = field(init=False)
    share: Share = field(init=False)
    search: Search = field(init=False)
    _photos: FairExecutor = field(init=False)
    _short: ThreadPoolExecutor = field(init=False)
    _short_waiting: int = 0
    # A line goes away with the last one in it.
    _lines: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)

    def __post_init__(self) -> None:
        threads = self.settings.compute_threads or processors()
        self._photos = FairExecutor(
            threads, self.settings.compute_queue, initializer=_in_the_background, crowded=NoRoomYet
        )
        self._short = ThreadPoolExecutor(max(2, threads), thread_name_prefix="compute", initializer=_one_thread_each)
        self.reader = open_reader(self.settings)
        self.passwords = PasswordPool(self.settings.password_pool, self.settings.password_queue)
        self.backoff = Backoff(self.settings, self.keys)
        self.probing = Probing(self.settings, self.keys)
        self.limits = RateLimits(self.settings, self.keys)
        self.share = Share(self.boundaries.share, self.settings.share_timeout_seconds)
        self.search = Search(
            self.keys,
            self.compute,
            self._generations(),
            self.share,
            Limits(self.settings.index_memory_mib, self.settings.index_shadow_every, self.settings.index_device),
        )

    def _generations(self) -> GenerationStore:
        copies, guards = self.settings.index_copies_of(self.places.owner.id), self.places.guards
        return GenerationStore(
            self.settings.vector_db_path, copies, share_guard=guards["index"], cache_guard=guards["copies"]
        )

    async def compute(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a short blocking step (searching, opening, hashing: some milliseconds) in threads that photos do not use.

        Raises NotReady when too many steps wait already: a late answer is of no use.
        """
        if self._short_waiting >= MOST_SHORT_WAITING:
            raise _busy()
        self._short_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._short, lambda: work(*args, **kwargs))
        finally:
            self._short_waiting -= 1

    async def compute_long(self, caller: str, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run long blocking work (a photo, a tile of a scan) in the threads that callers share fairly.

        caller: whose work it is. The caller who has used the threads least is served next. Work that must wait for another large
        photo gives its thread back, and starts again later. Raises NotReady when too much work waits already.
        """

        def giving() -> T:
            with giving_way():
                try:
                    return work(*args, **kwargs)
                except Problem as problem:
                    # The traceback refers to decoded pixels, and would keep them in memory until garbage collection.
                    problem.__context__ = problem.__cause__ = None
                    raise problem.with_traceback(None) from None

        try:
            return await self._photos.run(caller, giving)
        except TooMuchWaits:
            raise _busy() from None

    async def transaction(
        self, body: Callable[[AsyncClientSession], Awaitable[T]], *, seconds: float | None = None
    ) -> T:
        """Run the body in one MongoDB transaction, again on a conflict, within the time limit as a whole.

        The body may run more than once. seconds: another limit than the setting's. Raises PyMongoError when the store is
        away or the limit is over.
        """
        self.boundaries.mongo.require_open()
        with pymongo.timeout(self.settings.mongodb_timeout_seconds if seconds is None else seconds):
            async with self.mongo.start_session() as session:
                return await session.with_transaction(
                    body,
                    read_concern=ReadConcern("snapshot"),
                    write_concern=WriteConcern("majority", j=True),
                    read_preference=ReadPreference.PRIMARY,
                )

    async def in_line(self, about: str, body: Callable[[AsyncClientSession], Awaitable[T]]) -> T:
        """A transaction that writes to what many write to: one at a time in this process, waiting included in the limit.

        about: the gallery whose `seq` it takes, the identity whose attempts it counts. Racing on one document costs far more than
        waiting in line (measured: 48/s with a p99 of 7.7 s racing at 100 in flight, 235/s one at a time). Raises
        DependencyUnavailable when the turn does not come in time.
        """
        limit = self.settings.mongodb_timeout_seconds
        lock, began = self._lines.setdefault(about, asyncio.Lock()), time.monotonic()
        try:
            async with asyncio.timeout(limit):
                await lock.acquire()
        except TimeoutError as error:
            raise DependencyUnavailable("The document store is too slow at the moment.") from error
        try:
            # At least a little: a turn that comes late is no reason to fail where the store answers at once.
            left = max(LAST_CHANCE_SECONDS, limit - (time.monotonic() - began))
            return await self.transaction(body, seconds=left)
        finally:
            lock.release()

    def require_contract(self, gallery: Gallery) -> None:
        """Raises ModelMismatch when the gallery's templates were made by another model than this process runs.

        Raises NotReady while the gallery is being moved to another model.
        """
        card = self.engine.card
        if gallery.moves_to is not None:
            raise NotReady(
                f"Gallery {gallery.name} is being moved to another face model. Try again in a moment. If the move was "
                f"interrupted, `idem models re-embed --gallery {gallery.name}` finishes it.",
                retry_after_seconds=5,
            )
        if gallery.contract != card.contract:
            other = f"an older version of {card.pack}" if gallery.pack == card.pack else gallery.pack
            raise ModelMismatch(
                f"Gallery {gallery.name} was made with {other}; {card.pack} is running. "
                f"`idem models re-embed --gallery {gallery.name}` moves the gallery to the running model."
            )

    async def stored_photo(self, gallery: Gallery, identity: identities.Identity, sample: identities.Sample) -> bytes:
        """The sample's stored photo, a JPEG. Raises PhotoMissing if it is missing, changed, or of another sample."""
        try:
            sealed = await self.photos.get(sample.photo_key)
            key = data_key(self.keys, gallery, identity)
            return await self.compute(open_photo, key, sealed, gallery.id, identity.id, sample.id)
        except PhotoNotFound as error:
            log.error("photo_missing", identity=identity.id, sample=sample.id)  # noqa: TRY400 - its fields say all
            raise PhotoMissing("This photo is missing from the photo store.") from error
        except SealBroken as error:
            log.error("photo_broken", identity=identity.id, sample=sample.id)  # noqa: TRY400
            raise PhotoMissing("The photo store has other bytes under the key of this photo.") from error

    def starting_policy(self) -> GalleryPolicy:
        """What a gallery of the running model asks for when nobody says otherwise."""
        card = self.engine.card
        return GalleryPolicy(
            verify_fmr=card.verify_fmr,
            identify_fpir=card.identify_fpir,
            dedup_fpir=card.dedup_fpir,
            liveness="observe" if self.engine.has_liveness else "off",
        )

    async def create_gallery(
        self, name: str, policy: GalleryPolicy, session: AsyncClientSession | None = None
    ) -> Gallery:
        """Insert an empty gallery bound to the running model. Raises DuplicateKeyError when the name is taken."""
        id_ = new_id()
        # First of all, so that the photos and index files of the gallery always count as this store's own.
        await stores.Store.remember([id_])
        self.places.owner.galleries.add(id_)
        gallery = Gallery.fresh(name, self.engine.card, policy, id_=id_, wrapped_keys=self.keys.new_gallery_keys(id_))
        await gallery.insert(session=session)
        return gallery

    async def _ensure_default_gallery(self) -> None:
        """The gallery `default` exists from the start; an unused one follows a change of model."""
        gallery = await Gallery.named(DEFAULT_GALLERY)
        card = self.engine.card
        if gallery is None:
            try:
                await self.create_gallery(DEFAULT_GALLERY, self.starting_policy())
            except DuplicateKeyError:
                return  # another process was faster
        elif gallery.contract != card.contract:
            await Gallery.get_pymongo_collection().update_one(
                {"_id": gallery.id, "seq": 0},
                {"$set": {
                    "pack": card.pack, "dimension": card.dimension, "contract": card.contract, "licence": card.licence,
                    "policy": self.starting_policy().model_dump(), "epoch": new_id(),
                    "published": None, "previous": None, "fault": None, "purge_by": None,
                }},
            )  # fmt: skip

    def end_threads(self) -> None:
        """End the compute threads after the work that they have begun."""
        self._photos.shutdown()
        self._short.shutdown(wait=False, cancel_futures=True)

    async def close(self) -> None:
        """Let go of everything, in the order of use."""
        await self.search.close()
        await self.queue.close()
        await self.limits.close()
        await self.photos.close()
        await self.evidence.close()
        self.passwords.close()
        self.end_threads()
        self.reader.close()
        self.engine.close()
        await self.mongo.close()


def _in_the_background() -> None:
    """One thread per photo or search, as many side by side as cores: threads inside each only fight.

    They are nicer than the event loop and the stores, whose short work would else wait behind whole photos: 10 to 20% more
    verifications a second were measured with four and eight callers on two cores.
    """
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), COMPUTE_NICENESS)
    _one_thread_each()


def _one_thread_each() -> None:
    faiss.omp_set_num_threads(1)
    cv2.setNumThreads(1)


def _busy() -> NotReady:
    return NotReady("The service is busy; please try again in a moment.", retry_after_seconds=2)


async def _open_access(settings: Settings, keys: KeyRing) -> Access:
    try:
        await open_root(keys)
        return await open_access(settings, keys)
    except SealBroken as error:
        message = "KEY_ENCRYPTION_KEY is not the key that this store was sealed with"
        raise ValueError(message) from error


def _open_photos(settings: Settings) -> LocalPhotoStore | MinioPhotoStore:
    if settings.photo_store == "local":
        return LocalPhotoStore(settings.storage_path)
    return MinioPhotoStore(
        endpoint=settings.minio_endpoint,
        access_key=settings.minio_access_key,
        secret_key=settings.minio_secret_key.get_secret_value(),
        bucket=settings.minio_bucket,
        region=settings.minio_region,
        secure=settings.minio_secure,
    )


async def _open_evidence(settings: Settings, *, serves: bool) -> EvidenceStore:
    """Raises UnsafeProduction for a bucket whose objects could be replaced; one that is away is asked before it is written to."""
    if not settings.evidence_bucket:
        return FolderEvidence(settings.evidence_path)
    store = BucketEvidence(
        endpoint=settings.minio_endpoint,
        access_key=settings.minio_access_key,
        secret_key=settings.minio_secret_key.get_secret_value(),
        bucket=settings.evidence_bucket,
        region=settings.minio_region,
        secure=settings.minio_secure,
        retention_days=settings.evidence_retention_days,
        needs_lock=settings.is_production,
    )
    try:
        is_locked = not serves or await store.is_locked()
    except EvidenceUnavailable:
        return store
    if not is_locked:
        if settings.is_production:
            await store.close()
            message = f"EVIDENCE_BUCKET {settings.evidence_bucket} has no object lock: name another, it is made with it"
            raise UnsafeProduction(message)
        log.critical("evidence_bucket_unlocked", bucket=settings.evidence_bucket)
    return store


async def _open_places(
    settings: Settings, database: "AsyncDatabase[dict[str, Any]]", boundaries: Boundaries, *, serves: bool
) -> tuple[Places, PhotoStore]:
    """The places of this database's store, and its photo store, which has a guard."""
    ids = [row["_id"] async for row in Gallery.get_pymongo_collection().find({}, {"_id": 1})]
    store = await stores.Store.opened(database, ids)
    owner, photos = owner_of(settings, store), _open_photos(settings)
    bucket = settings.evidence_bucket
    evidence = OwnedEvidence(
        BoundedEvidence(await _open_evidence(settings, serves=serves), boundaries.evidence), owner,
        "EVIDENCE_BUCKET" if bucket else "EVIDENCE_PATH", bucket or str(settings.evidence_path),
    )  # fmt: skip
    guards = guards_of(settings, owner, photos)
    return Places(owner, guards, evidence, timeout_seconds=min(settings.share_timeout_seconds, LOOK_SECONDS)), photos


async def _drop_former_copies(settings: Settings) -> None:
    """Delete this store's copies in the place that earlier versions used for all stores. Some contain people erased later.

    Another deployment may still use that place. A restored database has other epochs than its original. A copied one has the
    same epochs, and a drill deletes nothing, so both delete no copies.
    """
    store = await stores.Store.get(stores.STORE)
    if settings.foreign_stores == "read" or store is None or store.copied_from:
        return
    rows = Gallery.get_pymongo_collection().find({}, {"epoch": 1})
    epochs = {row["_id"]: row["epoch"] async for row in rows}
    await asyncio.to_thread(drop_generations_below, settings.index_cache_path, epochs)


@asynccontextmanager
async def open_runtime(
    settings: Settings,
    engine: FaceEngine | None = None,
    *,
    warm: bool = False,
    keep_up: bool = False,
    restoring: bool = False,
    claims: bool = True,
) -> AsyncIterator[Runtime]:
    """Open everything a process owns, with indexes and the default gallery in place; close it at the end.

    engine: an opened engine to use instead of the one that the settings name; closed with the rest. warm: also load the model's
    weights, while MongoDB is being asked. keep_up: for a process that serves for long. It follows the index's generations in the
    background, and ends when a backup is put in place. restoring: for the process that puts a backup in place; until it is done,
    other processes are not admitted. claims: mark the places that are free, and refuse those of another store. Raises NotReady
    for a process that is not admitted, ModelUnavailable, ValueError (no key-encryption key, or not the store's), PlaceRefused,
    UnsafeProduction or PyMongoError when it cannot start.
    """
    reason = "it was given"
    if engine is None:
        opened = open_engine(settings, device=settings.face_device)
        engine, reason = opened.engine, opened.reason
    warming = asyncio.create_task(asyncio.to_thread(engine.warm)) if warm else None
    keys = KeyRing(settings.key_encryption_secret(), settings.key_encryption_previous_secrets())
    boundaries = Boundaries.of(settings)
    mongo = BoundedMongoClient(
        boundaries.mongo,
        settings.mongodb_uri,
        w="majority",
        journal=True,
        readConcernLevel="majority",
        maxPoolSize=settings.mongodb_max_pool_size,
        minPoolSize=settings.mongodb_min_pool_size,
        appname=application_name(settings.mongodb_database, restoring=restoring),
        serverSelectionTimeoutMS=2000,
        connectTimeoutMS=1000,
        # Each call outside of a transaction is bounded by this; a transaction as a whole by pymongo.timeout.
        timeoutMS=int(settings.mongodb_timeout_seconds * 1000),
        tz_aware=True,
    )
    runtime = None
    try:
        clock = Clock()
        await clock.measure(mongo)
        go_by(clock)
        if not restoring:
            await admitted(mongo[settings.mongodb_database], waits=keep_up)
        with pymongo.timeout(PREPARING_SECONDS):
            # Accounts of a backup beside galleries of the store that it replaces would lose what they may see.
            if not (restoring and await restores.is_in_between(mongo[settings.mongodb_database])):
                await migrate(mongo[settings.mongodb_database])
            await init_beanie(database=mongo[settings.mongodb_database], document_models=DOCUMENTS)
        places, photos = await _open_places(settings, mongo[settings.mongodb_database], boundaries, serves=keep_up)
        runtime = Runtime(
            settings=settings, mongo=mongo, engine=engine, engine_reason=reason,
            photos=BoundedPhotos(photos, boundaries.photos), evidence=places.evidence,
            keys=keys, queue=Queue(settings, boundaries.queue, places.owner.id), access=await _open_access(settings, keys),
            boundaries=boundaries, clock=clock, places=places,
        )  # fmt: skip
        if claims:
            await places.claim()
        if keep_up and settings.index_copies_of(places.owner.id) != settings.index_cache_path:
            await _drop_former_copies(settings)
        if settings.is_production and (known := await accounts.development_users()):
            message = f"users of a development stack are still enabled: {', '.join(known)}; disable or delete them"
            raise UnsafeProduction(message)
        await runtime._ensure_default_gallery()  # noqa: SLF001 - its own module
        await tree.AuditTree.ensure()
        await tree.AuditKey.ensure(keys)
        if warming is not None:
            await warming
        async with AsyncExitStack() as background:
            if keep_up:
                await background.enter_async_context(clock.kept_right(mongo))
                await background.enter_async_context(leaving_for_a_restore(mongo[settings.mongodb_database]))
                await background.enter_async_context(runtime.search.kept_up())
            yield runtime
    finally:
        if runtime is not None:
            await runtime.close()
        else:
            engine.close()
            await mongo.close()
