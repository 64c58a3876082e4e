"""What lies on the disks after a day's work: no photo, template, name, reference or date of birth in the clear.

mongod writes plain blocks here, without compression, so that what is on its disk can be searched. What the index folder
holds is the documented exception: vectors, turned by the gallery's secret rotation.
"""

import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pymongo
import pytest
import redis
from bson.raw_bson import RawBSONDocument

from app.config import Settings
from app.devstack import servers
from app.devstack.stack import embedded_settings, idem
from app.documents.galleries import Gallery
from app.documents.identities import Identity
from app.documents.sealed import data_key, open_template
from app.runtime import open_runtime
from storage.rows import VECTORS_FILE
from tests.e2e.builders import Service, enrol, identify, open_service, part, people, verify
from tests.support.plain_scan import Finding, PlainScan
from tests.support.stacks import RunningStack, running_stack

#: Folders of a stack's data; beside them lie the keys of a trial, which a real installation keeps elsewhere.
STORES = ("mongo", "redis", "photos", "index", "index-copies", "logs", "evidence")
#: Where turned vectors may lie.
INDEX = ("index", "index-copies")
PLAIN_BLOCKS = (
    "--wiredTigerCollectionBlockCompressor none --wiredTigerJournalCompressor none"
    " --wiredTigerIndexPrefixCompression false"
)
PERSON = {
    "full_name": "Zsófia Quillfeather-Abernathy",
    "external_ref": "NID-77310-XYZZY",
    "date_of_birth": "1987-03-14",
    "metadata": json.dumps({"office": "Plughtavik harbour desk"}),
}


@dataclass(frozen=True, slots=True)
class DayOfWork:
    """A stack that has enrolled, decided and answered, and everything that must not be read from its disks."""

    stack: RunningStack
    service: Service
    binaries: dict[str, bytes]
    texts: dict[str, str]
    turned: dict[str, bytes]

    def scan(self) -> PlainScan:
        return PlainScan(self.binaries, self.texts)

    def in_the_clear(self, scan: PlainScan, *folders: str) -> list[Finding]:
        """Findings in the folders named, or in every store: its files, and what the servers say when they are asked."""
        found = [one for name in folders or STORES for one in scan.files(self.stack.data_dir / name)]
        if "mongo" in (folders or STORES):
            found += self._in_mongo(scan)
        if "redis" in (folders or STORES):
            found += self._in_redis(scan)
        return found

    def checkpoint(self) -> None:
        """Have mongod write out what it knows."""
        with pymongo.MongoClient[dict[str, object]](self.stack.ready.mongo_uri) as mongo:
            mongo.admin.command("fsync")

    def _in_mongo(self, scan: PlainScan) -> Iterator[Finding]:
        with pymongo.MongoClient(self.stack.ready.mongo_uri, document_class=RawBSONDocument) as mongo:
            for database in mongo.list_database_names():
                for name in mongo[database].list_collection_names():
                    everything = b"".join(document.raw for document in mongo[database][name].find())
                    yield from scan.within(everything, f"{database}.{name}")

    def _in_redis(self, scan: PlainScan) -> Iterator[Finding]:
        with redis.Redis.from_url(self.stack.ready.redis_url) as server:
            for key in server.scan_iter():
                yield from scan.within(key + b" " + (server.dump(key) or b""), f"redis {key!r}")


@pytest.fixture(scope="module")
def plain_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a mongod that compresses nothing."""
    folder = tmp_path_factory.mktemp("bin")
    wrapper = folder / "mongod"
    wrapper.write_text(f'#!/bin/sh\nexec {servers.find_mongod()} "$@" {PLAIN_BLOCKS}\n')
    wrapper.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
async def day(
    tmp_path_factory: pytest.TempPathFactory, plain_blocks: Path, stack_environment: dict[str, str], model_dir: Path
) -> AsyncIterator[DayOfWork]:
    environment = stack_environment | {"PATH": f"{plain_blocks}{os.pathsep}{stack_environment['PATH']}"}
    folder = tmp_path_factory.mktemp("plain") / "data"
    with running_stack(folder, "--no-demo", environment=environment) as stack, open_service(stack.ready) as service:
        binaries = worked(service)
        published(folder, environment)
        identify(service.app, people()[1].selfie)  # this process has the generation's copy now
        templates = await templates_in(folder, model_dir)
        binaries |= {f"{name} (float32)": vector.astype("<f4").tobytes() for name, vector in templates.items()}
        binaries |= {f"{name} (float16)": vector.astype("<f2").tobytes() for name, vector in templates.items()}
        binaries |= {f"{name} (float64)": vector.astype("<f8").tobytes() for name, vector in templates.items()}
        turned = {str(path): path.read_bytes() for path in (folder / "index").rglob(VECTORS_FILE)}
        texts = PERSON | {"metadata": "Plughtavik harbour desk"}
        texts["key-encryption key"] = (folder / "key_encryption_key").read_text().strip()
        texts["officer's password"] = json.loads((folder / "credentials.json").read_text())["users"]["officer"][
            "password"
        ]
        done = DayOfWork(stack, service, binaries, texts, turned)
        done.checkpoint()
        yield done


def worked(service: Service) -> dict[str, bytes]:
    """Enrol, suspect, decide, search, verify, change, look at; the photos that went in and that are kept."""
    first, other = people()[1], people()[2]
    made = enrol(service, "default", first.photo, **PERSON)
    enrol(service, "default", other.photo)
    suspected = enrol(service, "default", first.selfie)
    path = f"/v1/identities/{made['id']}"
    decision = {"decision": "duplicate", "identity_id": made["id"], "reason": "the same woman"}
    assert service.officer.post(f"/v1/dedup/cases/{suspected['dedup']['case_id']}/decision", json=decision).is_success
    assert verify(service.app, other.selfie, identity_id=made["id"]).json()["match"] is False
    assert verify(service.app, first.selfie, identity_id=made["id"]).json()["match"] is True
    assert identify(service.officer, first.selfie).json()["candidates"]
    assert service.officer.post(f"{path}/samples", files=[part(first.selfie)]).status_code in (202, 409)
    assert service.officer.patch(path, json={"full_name": PERSON["full_name"]}).is_success
    for question in ({"external_ref": PERSON["external_ref"]}, {"q": PERSON["full_name"][:6]}):
        service.officer.get("/v1/identities", params=question)
    kept = service.officer.get(f"{path}/samples/{made['samples'][0]['id']}/photo")
    assert kept.is_success
    return {
        "a photo as it came": first.photo,
        "a selfie as it came": first.selfie,
        "a photo as it is kept": kept.content,
    }


def published(folder: Path, environment: Mapping[str, str]) -> None:
    """Have the stack's index written to its folder."""
    command = idem("index", "publish", "--data-dir", str(folder))
    subprocess.run(command, env=dict(environment), check=True, capture_output=True, timeout=120)


async def templates_in(folder: Path, model_dir: Path) -> dict[str, np.ndarray]:
    """Every template in the stack's store, opened with its key."""
    found = {}
    async with open_runtime(embedded_settings(Settings(_env_file=None, model_dir=model_dir), folder)) as runtime:
        async for identity in Identity.find({"status": {"$ne": "erased"}}):
            gallery = await Gallery.get(identity.gallery_id)
            assert gallery is not None
            key = data_key(runtime.keys, gallery, identity)
            for sample in identity.samples:
                found[f"the template {sample.id}"] = open_template(key, gallery.id, identity.id, sample)
    assert len(found) >= 3
    return found


def test_nothing_personal_lies_in_the_clear_in_any_store(day: DayOfWork) -> None:
    assert day.in_the_clear(day.scan()) == []


def test_turned_vectors_lie_in_the_index_folder_only(day: DayOfWork) -> None:
    scan = PlainScan(day.turned, {})
    assert day.turned
    assert day.in_the_clear(scan, "index") != []
    assert day.in_the_clear(scan, *(name for name in STORES if name not in INDEX)) == []


def test_the_search_finds_what_is_planted_in_each_store(day: DayOfWork) -> None:
    """After the others: what is planted stays."""
    folder, scan = day.stack.data_dir, day.scan()
    template = next(data for name, data in day.binaries.items() if name.endswith("(float16)"))
    photo = day.binaries["a photo as it is kept"]
    with pymongo.MongoClient[dict[str, object]](day.stack.ready.mongo_uri) as mongo:
        mongo["idem"]["planted"].insert_one({"template": template, "name": PERSON["full_name"]})
    day.checkpoint()
    with redis.Redis.from_url(day.stack.ready.redis_url) as server:
        server.set("planted", photo[1000:1100])
    for name in ("mongo", "redis"):
        assert day.in_the_clear(scan, name) != [], name
    for name in ("photos", "index", "logs"):  # looked for at once: the services sweep what they do not know
        (folder / name / "planted").write_bytes(b"xyz" + photo[2000:2064])
        assert day.in_the_clear(scan, name) != [], name
    assert scan.files(folder / "mongo") != []  # and not only by asking the server
