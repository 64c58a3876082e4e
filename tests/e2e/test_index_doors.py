"""The index as its operator meets it: `idem index` on a running stack, `/ready`, `/metrics`, `/v1/system`, the gallery's page."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from app.devstack.stack import idem
from tests.e2e.builders import Service, enrol, identify, people
from tests.support.stacks import RunningStack

SEEN_WITHIN_SECONDS = 20.0


def _idem(stack: RunningStack, environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = idem("index", *words, "--data-dir", str(stack.data_dir))
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SEEN_WITHIN_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_published_gallery_answers_as_before_and_says_how_good_its_index_is(
    service: Service, stack: RunningStack, gallery: str, stack_environment: dict[str, str]
) -> None:
    person, other = people()[:2]
    made = enrol(service, gallery, person.photo)
    before = identify(service.officer, person.photo, gallery=gallery).json()
    assert [c["identity_id"] for c in before["candidates"]] == [made["id"]]

    published = _idem(stack, stack_environment, "publish", "--gallery", gallery, "--json")
    assert published.returncode == 0, published.stderr
    generation = json.loads(published.stdout)[gallery]
    assert (generation["kind"], generation["count"], generation["watermark"]) == ("exact", 1, 1)

    page = service.officer.get(f"/v1/galleries/{gallery}").json()
    assert page["index"] == {
        "kind": "exact", "generation": generation["number"], "vectors": 1, "tail": 0, "recall": 1.0,
    }  # fmt: skip
    found = list(Path(stack.data_dir).glob(f"index/{page['id']}/*-{generation['number']}/MANIFEST.json"))
    assert len(found) == 1
    enrol(service, gallery, other.photo)
    assert service.officer.get(f"/v1/galleries/{gallery}").json()["index"]["tail"] == 1
    for _ in range(10):  # on both processes, whichever of the two generations of vectors they are on
        after = identify(service.officer, person.photo, gallery=gallery).json()["candidates"]
        assert [c["score"] for c in after] == [c["score"] for c in before["candidates"]]

    def is_in_use() -> bool:  # each connection may reach another process, with figures of its own
        line = f'idem_index_generation{{gallery="{gallery}"}} {generation["number"]}.0'
        return line in httpx.get(f"{service.url}/metrics").text

    _until(is_in_use)
    (row,) = [r for r in service.admin.get("/v1/system").json()["index"] if r["gallery"] == gallery]
    assert (row["generation"], row["trouble"], row["publishing"]) == (generation["number"], None, None)


def test_status_verify_tune_and_rebuild_tell_what_they_did(
    service: Service, stack: RunningStack, gallery: str, stack_environment: dict[str, str]
) -> None:
    enrol(service, gallery, people()[0].photo)
    assert _idem(stack, stack_environment, "publish", "--gallery", gallery).returncode == 0
    rebuilt = _idem(stack, stack_environment, "rebuild", "--gallery", gallery)
    assert rebuilt.returncode == 0
    assert "1 vectors" in rebuilt.stdout
    status = _idem(stack, stack_environment, "status", "--gallery", gallery, "--json")
    (row,) = json.loads(status.stdout)
    assert (row["gallery"], row["vectors"], row["recall"], row["trouble"]) == (gallery, 1, 1.0, None)
    assert gallery in _idem(stack, stack_environment, "status").stdout
    verified = _idem(stack, stack_environment, "verify", "--gallery", gallery)
    assert verified.returncode == 0
    assert "1 vectors are those of the documents" in verified.stdout
    tuned = _idem(stack, stack_environment, "tune", "--gallery", gallery, "--json")
    assert tuned.returncode == 0, tuned.stderr
    assert json.loads(tuned.stdout)[0]["gallery"] == gallery


def test_a_changed_byte_is_found_told_in_readiness_and_mended_by_the_worker(
    service: Service, stack: RunningStack, gallery: str, stack_environment: dict[str, str]
) -> None:
    person = people()[0]
    made = enrol(service, gallery, person.photo)
    assert _idem(stack, stack_environment, "publish", "--gallery", gallery).returncode == 0
    page = service.officer.get(f"/v1/galleries/{gallery}").json()
    (vectors,) = Path(stack.data_dir).glob(f"index/{page['id']}/*/vectors.f16")
    # Once this host has its verified copy nobody but the command reads the share again.
    copy = Path(stack.data_dir, "index-copies", page["id"], vectors.parent.name, vectors.name)
    _until(copy.exists)
    data = bytearray(vectors.read_bytes())
    data[3] ^= 1
    vectors.chmod(0o600)
    vectors.write_bytes(data)
    verified = _idem(stack, stack_environment, "verify", "--gallery", gallery)
    assert verified.returncode == 1
    assert "vectors.f16" in verified.stderr
    number = page["index"]["generation"]
    _until(lambda: service.officer.get(f"/v1/galleries/{gallery}").json()["index"]["generation"] > number)
    assert _idem(stack, stack_environment, "verify", "--gallery", gallery).returncode == 0
    assert [
        c["identity_id"] for c in identify(service.officer, person.photo, gallery=gallery).json()["candidates"]
    ] == [made["id"]]


def test_an_unknown_gallery_or_folder_is_said_so(
    stack: RunningStack, stack_environment: dict[str, str], tmp_path: Path
) -> None:
    unknown = _idem(stack, stack_environment, "publish", "--gallery", "nobody")
    assert (unknown.returncode, "There is no gallery" in unknown.stderr) == (1, True)
    command = idem("index", "status", "--data-dir", str(tmp_path))
    nowhere = subprocess.run(command, env=stack_environment, capture_output=True, text=True, timeout=60, check=False)
    assert nowhere.returncode == 78
    assert "idem up" in nowhere.stderr
