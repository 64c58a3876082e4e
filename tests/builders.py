"""What a test needs in place before its own sentence begins: portraits, people in galleries, verdicts, second processes."""

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import date

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from app.audit import Action
from app.boundary import Boundaries
from app.documents.cases import Case
from app.documents.galleries import DEFAULT_GALLERY, Gallery
from app.documents.identities import Identity
from app.documents.root_secret import open_root
from app.domain.attributes import GivenAttributes
from app.domain.callers import Caller, Role
from app.domain.policy import Decision
from app.keys import KeyRing
from app.queue import Queue
from app.runtime import Runtime
from app.use_cases import enrol, erase, screen, standing
from app.use_cases.adjudicate import Judgement, adjudicate
from app.use_cases.identify import Identification, identify
from app.use_cases.verify import Claim, Verification, verify
from storage.photos import PhotoStore
from tests.fakes import FakeEngine, inscribed

OFFICER = Caller("officer-1", "user", "Olga Officer", frozenset({Role.OFFICER}), None, "token-1", "session-1")
SECOND_OFFICER = Caller("officer-2", "user", "Otto Officer", frozenset({Role.OFFICER}), None, "token-3", "session-2")
APP = Caller("app-1", "client", "Bank", frozenset({Role.RELYING_APP}), None, "token-2", audiences=("app-1",))


def by_officer(name: str, caller: Caller = OFFICER) -> Action:
    """An officer's action."""
    return Action(name=name, caller=caller, request_id="request-1", ip="192.0.2.1")


def by_app(name: str) -> Action:
    """A relying application's action."""
    return Action(name=name, caller=APP, request_id="request-2", ip="192.0.2.2")


def portrait(*people: str, capture: int = 0) -> bytes:
    """A photo of a person; of somebody who looks like several people; of nobody."""
    text = f"{'+'.join(people)}|{capture}" if people else ""
    buffer = io.BytesIO()
    Image.fromarray(inscribed(text)).save(buffer, "PNG")
    return buffer.getvalue()


def coded_anew(photo: bytes, number: int = 0) -> bytes:
    """The photo as a coder with losses leaves it, for each number with others: some pixels of its last rows differ."""
    buffer = io.BytesIO()
    pixels = np.array(Image.open(io.BytesIO(photo)))
    pixels[-8:, -8:] = 100 + number
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def in_another_file(photo: bytes, number: int = 0) -> bytes:
    """The same picture in other bytes, for each number others: PNG with a note."""
    buffer, note = io.BytesIO(), PngInfo()
    note.add_text("number", str(number))
    Image.open(io.BytesIO(photo)).save(buffer, "PNG", pnginfo=note)
    return buffer.getvalue()


async def default_gallery() -> Gallery:
    """The gallery that everybody is in, as it stands now."""
    gallery = await Gallery.named(DEFAULT_GALLERY)
    assert gallery is not None
    return gallery


async def known(identity: Identity | str) -> Identity:
    """The identity as it stands now."""
    found = await Identity.living(identity if isinstance(identity, str) else identity.id)
    assert found is not None
    return found


async def enrolled(
    runtime: Runtime,
    *people: str,
    capture: int = 0,
    external_ref: str | None = None,
    full_name: str | None = None,
    date_of_birth: date | None = None,
    photos: int = 1,
    gallery: Gallery | None = None,
) -> Identity:
    """Somebody who has just been enrolled, by default into the gallery `default`, and waits for the verdict."""
    attributes = GivenAttributes(external_ref=external_ref, full_name=full_name, date_of_birth=date_of_birth)
    given = [portrait(*people, capture=capture + i) for i in range(photos)]
    gallery = gallery or await default_gallery()
    return await enrol.enrol(runtime, by_officer("identity.enrol"), gallery, given, attributes)


async def screened(runtime: Runtime, identity: Identity) -> Identity:
    """The identity after its newest screening."""
    await screen.screen(runtime, identity.id, identity.screenings[-1].job_id)
    return await known(identity)


async def settled(runtime: Runtime, *people: str, capture: int = 0, external_ref: str | None = None) -> Identity:
    """Somebody enrolled and screened, whatever the verdict."""
    return await screened(runtime, await enrolled(runtime, *people, capture=capture, external_ref=external_ref))


async def active(runtime: Runtime, *people: str, capture: int = 0, external_ref: str | None = None) -> Identity:
    """Somebody whose verdict was "unique"."""
    identity = await settled(runtime, *people, capture=capture, external_ref=external_ref)
    assert identity.status == "active"
    return identity


async def suspected(runtime: Runtime, *people: str, capture: int = 1) -> tuple[Identity, Case]:
    """Somebody who looks like others in the gallery, and the case about it."""
    identity = await settled(runtime, *people, capture=capture)
    assert identity.status == "suspected_duplicate"
    return identity, await case_about(identity)


async def case_about(identity: Identity) -> Case:
    """The one open case with the identity as its newcomer."""
    cases = await Case.find({"newcomer_id": identity.id, "state": "open"}).to_list()
    assert len(cases) == 1
    return cases[0]


async def with_sample(runtime: Runtime, identity: Identity, *people: str, capture: int = 5) -> Identity:
    """The identity with one more photo, screened."""
    gallery = await default_gallery()
    photo = portrait(*people, capture=capture)
    later = await enrol.add_sample(runtime, by_officer("sample.add"), gallery, await known(identity), photo)
    return await screened(runtime, later)


async def decided(
    runtime: Runtime,
    case: Case,
    decision: Decision,
    about: Identity | None = None,
    keep: Identity | None = None,
    *,
    by: Caller = OFFICER,
) -> Case:
    """The case after an officer's decision."""
    judgement = Judgement(decision, None if about is None else about.id, None if keep is None else keep.id, "looked")
    return await adjudicate(runtime, by_officer("dedup.decide", by), await default_gallery(), case.id, judgement)


async def revoked(runtime: Runtime, identity: Identity) -> Identity:
    """The identity out of service."""
    action = by_officer("identity.revoke")
    return await standing.revoke(runtime, action, await default_gallery(), identity.id, "card lost")


async def reinstated(runtime: Runtime, identity: Identity) -> Identity:
    """The identity back in service."""
    action = by_officer("identity.reinstate")
    return await standing.reinstate(runtime, action, await default_gallery(), identity.id, "card found")


async def erased(runtime: Runtime, identity: Identity) -> erase.Receipt:
    """The receipt of an erasure."""
    return await erase.erase(runtime, by_officer("identity.erase"), await default_gallery(), identity.id, "asked for")


async def identified(runtime: Runtime, *people: str, capture: int = 9, limit: int = 10) -> Identification:
    """A search of the default gallery with a fresh photo."""
    gallery = await default_gallery()
    return await identify(runtime, by_officer("face.identify"), gallery, portrait(*people, capture=capture), limit)


async def verified(runtime: Runtime, identity: Identity, *people: str, capture: int = 9) -> Verification:
    """A relying application's question whether a fresh photo shows the identity."""
    claim = Claim(await known(identity), audience=None, nonce=None)
    photo = portrait(*people, capture=capture)
    return await verify(runtime, by_app("face.verify"), await default_gallery(), claim, photo)


@asynccontextmanager
async def another_process(runtime: Runtime, photos: PhotoStore | None = None) -> AsyncIterator[Runtime]:
    """A second Runtime over the same stores, with its own vectors in memory, locks and keys, as another process has.

    Documents are bound to one client in a process, so that is shared. photos: its photo store where it is another.
    """
    settings = runtime.settings
    keys = KeyRing(settings.key_encryption_secret(), settings.key_encryption_previous_secrets())
    await open_root(keys)
    # MongoDB's is shared, as its client is.
    boundaries = replace(Boundaries.of(settings), mongo=runtime.boundaries.mongo)
    other = Runtime(
        settings=settings,
        mongo=runtime.mongo,
        engine=FakeEngine(runtime.engine.card),
        engine_reason="it was given",
        photos=photos or runtime.photos,
        evidence=runtime.evidence,
        keys=keys,
        queue=Queue(settings, boundaries.queue, runtime.places.owner.id),
        access=runtime.access,
        boundaries=boundaries,
        clock=runtime.clock,
        places=runtime.places,
    )
    yield other
    await other.search.close()
    await other.queue.close()
    other.end_threads()
