"""The labelled photos beside the repository, where there are any: everybody enrols, comes back, and is found again.

Which rule refuses a photo is part of the answer: the faces are of ordinary press photos, and other people stand behind some.
"""

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.builders import FACES, Service
from tests.support.stacks import RunningStack

#: A stated rule may refuse a photo for these reasons, and for no other.
STATED_RULES = {"multiple-faces", "face-too-small", "face-cropped", "low-quality", "no-face"}
#: Of these people the first photo is refused (see docs/models.md).
MOST_REFUSED_SHARE = 0.02
LEAST_FLAGGED_SHARE = 0.95
AT_ONCE = 6
VERDICTS_WITHIN_SECONDS = 60

PEOPLE = (
    sorted(folder for folder in FACES.iterdir() if folder.is_dir() and folder.name != "hard") if FACES.is_dir() else []
)


@dataclass(slots=True)
class Gallery:
    """One gallery, and what was seen in it. enrolled: identity ids by person; refused: slugs by photo."""

    http: httpx.AsyncClient
    name: str
    officer: dict[str, str]
    application: dict[str, str]
    enrolled: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    gate: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))

    async def ask(self, path: str, photo: Path, headers: dict[str, str], **fields: str) -> dict[str, Any] | None:
        """The answer, or None where a stated rule refuses the photo."""
        async with self.gate:
            answer = await self.http.post(
                path, headers=headers, data=fields, files={"photo": (photo.name, photo.read_bytes(), "image/jpeg")}
            )
        if answer.status_code == 422:
            slug = answer.json()["type"].rpartition("/")[2]
            assert slug in STATED_RULES, answer.text
            self.refused[f"{photo.parent.name}/{photo.name}"] = slug
            return None
        assert answer.status_code in {200, 201, 202}, answer.text
        return dict(answer.json())

    async def enrol(self, photo: Path, reference: str) -> str | None:
        """The new identity's id."""
        identity = await self.ask("/v1/identities", photo, self.officer, gallery=self.name, external_ref=reference)
        return None if identity is None else str(identity["id"])

    async def judged(self, identity_id: str) -> dict[str, Any]:
        """The identity with its verdict."""
        async with asyncio.timeout(VERDICTS_WITHIN_SECONDS):
            while True:
                answer = await self.http.get(f"/v1/identities/{identity_id}", headers=self.officer)
                if answer.json()["status"] != "pending":
                    return dict(answer.json())
                await asyncio.sleep(0.1)


def _photo(person: Path, number: int) -> Path | None:
    return next((path for path in person.iterdir() if path.stem == str(number)), None)


@pytest.fixture
async def gallery(stack: RunningStack, service: Service) -> AsyncIterator[Gallery]:
    name = f"faces-{uuid.uuid4().hex[:8]}"
    service.admin.post("/v1/galleries", json={"name": name}).raise_for_status()
    async with httpx.AsyncClient(base_url=stack.ready.url, timeout=60, trust_env=False) as http:
        headers = [{"Authorization": client.headers["Authorization"]} for client in (service.officer, service.app)]
        yield Gallery(http, name, *headers)


@pytest.mark.parametrize("people", [PEOPLE] if PEOPLE else [], ids=lambda people: f"{len(people)} people")
async def test_everybody_enrols_comes_back_and_is_noticed_when_they_enrol_twice(
    gallery: Gallery, people: list[Path]
) -> None:
    async def enrol_first(person: Path) -> None:
        photo = _photo(person, 1)
        assert photo is not None
        identity_id = await gallery.enrol(photo, person.name)
        if identity_id is not None:
            gallery.enrolled[person.name] = identity_id

    await asyncio.gather(*(enrol_first(person) for person in people))
    firsts = Counter(gallery.refused.values())
    assert len(gallery.enrolled) + sum(firsts.values()) == len(people)
    assert sum(firsts.values()) <= MOST_REFUSED_SHARE * len(people), firsts
    verdicts = [await gallery.judged(identity_id) for identity_id in gallery.enrolled.values()]
    assert Counter(v["status"] for v in verdicts) == Counter({"active": len(gallery.enrolled)}), "nobody is mixed up"

    seen: Counter[str] = Counter()
    wrong: list[str] = []

    async def come_back(person: Path, photo: Path) -> None:
        claim = {"identity_id": gallery.enrolled[person.name]}
        verification = await gallery.ask("/v1/verifications", photo, gallery.application, **claim)
        if verification is None:
            return
        seen["came back"] += 1
        seen["verified"] += verification["match"]
        found = await gallery.ask("/v1/identifications", photo, gallery.officer, gallery=gallery.name)
        names = [candidate["external_ref"] for candidate in (found or {})["candidates"]]
        seen["found first"] += names[:1] == [person.name]
        wrong.extend(f"{person.name} as {name}" for name in names if name != person.name)

    returning = [(p, photo) for p in people if p.name in gallery.enrolled and (photo := _photo(p, 2)) is not None]
    await asyncio.gather(*(come_back(person, photo) for person, photo in returning))
    assert seen["came back"] >= 0.85 * len(returning), gallery.refused
    assert seen["verified"] == seen["came back"], "everybody whom the model can match verifies"
    assert seen["found first"] >= LEAST_FLAGGED_SHARE * seen["came back"], seen
    assert wrong == [], "no two people are mixed up"

    async def enrol_again(person: Path, photo: Path) -> None:
        identity_id = await gallery.enrol(photo, f"{person.name}-again")
        if identity_id is None:
            return
        identity = await gallery.judged(identity_id)
        seen["enrolled twice"] += 1
        seen["flagged"] += identity["status"] == "suspected_duplicate"

    await asyncio.gather(*(enrol_again(person, photo) for person, photo in returning))
    assert seen["flagged"] >= LEAST_FLAGGED_SHARE * seen["enrolled twice"], seen
