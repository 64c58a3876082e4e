"""Two enrolments of one person at the same moment, through two API processes."""

import asyncio
import uuid
from itertools import cycle, islice

from app.devstack.client import Caller, Identity, ReadyStack, Service
from app.devstack.demo import Person, sample_people
from tests.support.stacks import RunningStack

PAIRS = 20
VERDICT_WITHIN_SECONDS = 30


async def test_h68_of_twenty_simultaneous_pairs_each_ends_as_one_active_and_one_suspected(stack: RunningStack) -> None:
    people = list(islice(cycle(sample_people()), PAIRS))
    # One connection each: the kernel hands them to whichever of the two API processes is free.
    async with Service(stack.ready.url, connections=1) as left, Service(stack.ready.url, connections=1) as right:
        doors = [await _officer(stack.ready, left), await _officer(stack.ready, right)]
        admin = await _admin(stack.ready, left)
        outcomes = [await _race(admin, doors, person) for person in people]
    assert outcomes == [["active", "suspected_duplicate"]] * PAIRS


async def _race(admin: Caller, doors: list[Caller], person: Person) -> list[str]:
    gallery = f"race-{uuid.uuid4().hex[:12]}"
    await admin.create_gallery(gallery)
    photos = (person.photo, person.selfie)
    both = await asyncio.gather(
        *(
            door.enrol(photo, gallery=gallery, external_ref=f"R{number}", full_name=person.name)
            for number, (door, photo) in enumerate(zip(doors, photos, strict=True))
        )
    )
    return sorted([(await _judged(doors[0], identity)).status for identity in both])


async def _judged(officer: Caller, identity: Identity) -> Identity:
    async with asyncio.timeout(VERDICT_WITHIN_SECONDS):
        while identity.status == "pending":
            await asyncio.sleep(0.05)
            identity = await officer.identity(identity.id)
    return identity


async def _officer(ready: ReadyStack, service: Service) -> Caller:
    credentials = ready.credentials()
    assert credentials is not None
    return await service.log_in(credentials.users.officer)


async def _admin(ready: ReadyStack, service: Service) -> Caller:
    credentials = ready.credentials()
    assert credentials is not None
    return await service.log_in(credentials.admin)
