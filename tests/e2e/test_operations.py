"""Operations over HTTP: alive, ready, measured; and what still works while a part is away."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.e2e.builders import (
    Page,
    Service,
    again,
    enrol,
    identify,
    identity,
    new_gallery,
    open_service,
    part,
    people,
    problem,
    verify,
)
from tests.support.stacks import RunningStack, running_stack

CHECKS = ("model", "mongo", "queue", "photos", "index", "worker", "clock")
GIVES_UP_WITHIN_SECONDS = 3.0
TURNS_RED_WITHIN_SECONDS = 5.0
RECOVERS_WITHIN_SECONDS = 30.0


def test_it_is_alive_without_asking_anybody(service: Service) -> None:
    answer = service.anonymous.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "alive"})


def test_g12_probes_may_ask_for_the_header_alone(service: Service) -> None:
    for path in ("/health", "/ready"):
        header, page = service.anonymous.head(path), service.anonymous.get(path)
        assert (header.status_code, header.content) == (page.status_code, b"")
        assert header.headers["content-type"] == page.headers["content-type"]
    refused = service.anonymous.head("/v1/galleries")
    assert (refused.status_code, refused.content) == (405, b"")
    assert service.anonymous.post("/health").headers["allow"] == "GET, HEAD"


def test_it_is_ready_and_says_what_it_saw(service: Service) -> None:
    answer = service.anonymous.get("/ready")
    page = answer.json()
    assert (answer.status_code, page["status"]) == (200, "ready")
    assert set(page) == {"status", "checks"}
    assert set(page["checks"]) == set(CHECKS)
    for check in page["checks"].values():
        assert check["status"] == "ok"
        assert check["latency_ms"] >= 0
    assert "127.0.0.1" not in answer.text


def test_its_figures_are_told_to_prometheus_without_ids(service: Service, gallery: str) -> None:
    made = enrol(service, gallery, people()[0].photo)
    for _ in range(20):  # two processes, each with figures of its own
        with httpx.Client(base_url=service.url, headers=service.officer.headers) as anew:
            anew.get(f"/v1/identities/{made['id']}")
    answer = service.anonymous.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'idem_requests_total{method="GET",route="/v1/identities/{identity_id}",status="200"}' in answer.text
    assert "idem_request_duration_seconds_bucket" in answer.text
    assert made["id"] not in answer.text


def test_the_operator_sees_the_system_without_its_secrets(service: Service, stack: RunningStack) -> None:
    answer = service.admin.get("/v1/system")
    page = answer.json()
    assert set(page) == {"version", "environment", "model", "index", "leases", "settings"}
    assert {"pack", "contract", "licence", "dimension", "source"} <= set(page["model"])
    assert page["settings"]["max_photo_pixels"] == 25_000_000
    for secret in (stack.ready.mongo_uri, stack.ready.redis_url, str(stack.data_dir)):
        assert secret not in answer.text
    assert not [name for name in page["settings"] if "key" in name or "secret" in name or "uri" in name]


@pytest.fixture(scope="module")
def own_stack(tmp_path_factory: pytest.TempPathFactory, stack_environment: dict[str, str]) -> Iterator[RunningStack]:
    """A stack that these tests may hurt."""
    folder = tmp_path_factory.mktemp("hurt") / "data"
    with running_stack(folder, "--no-demo", environment=stack_environment) as running:
        yield running


@pytest.fixture(scope="module")
def hurt(own_stack: RunningStack) -> Iterator[Service]:
    """That stack over HTTP."""
    with open_service(own_stack.ready) as opened:
        yield opened


@contextmanager
def frozen(stack: RunningStack, name: str) -> Iterator[None]:
    """The part hangs: its connections stay open, and nothing answers."""
    pid = stack.pid_of(name)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def photos_away(stack: RunningStack) -> Iterator[None]:
    """The photos' folder is gone, and a file lies in its place."""
    folder, aside = stack.data_dir / "photos", stack.data_dir / "photos-aside"
    folder.rename(aside)
    folder.write_text("not a folder")
    try:
        yield
    finally:
        folder.unlink()
        aside.rename(folder)


def readiness(service: Service) -> Page:
    """What /ready says, and with what status."""
    answer = service.anonymous.get("/ready")
    page: Page = answer.json()
    return page | {"http": answer.status_code}


def becomes(what: Callable[[], bool], within_seconds: float) -> float:
    """Seconds until it is so; fails when it takes longer."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < within_seconds
    return time.monotonic() - began


def settled(service: Service) -> bool:
    """Whether everything is there again."""
    return bool(readiness(service)["status"] == "ready")


def test_h82_with_the_queue_away_people_are_enrolled_and_authenticated(hurt: Service, own_stack: RunningStack) -> None:
    gallery = new_gallery(hurt)
    one, other = people()[1:3]
    known = enrol(hurt, gallery, one.photo)
    with frozen(own_stack, "redis"):
        began = time.monotonic()
        answer = hurt.officer.post("/v1/identities", files=[part(other.photo)], data={"gallery": gallery})
        assert answer.status_code == 202, answer.text
        assert time.monotonic() - began < GIVES_UP_WITHIN_SECONDS
        assert verify(hurt.app, one.selfie, identity_id=known["id"]).json()["match"]
        found = identify(hurt.app, again(one.selfie), gallery=gallery).json()["candidates"]
        assert [page["identity_id"] for page in found] == [known["id"]]
        page = readiness(hurt)
        assert (page["http"], page["status"], page["checks"]["queue"]["status"]) == (200, "degraded", "down")
    becomes(lambda: settled(hurt), RECOVERS_WITHIN_SECONDS)
    becomes(lambda: bool(identity(hurt, answer.json()["id"])["status"] == "active"), RECOVERS_WITHIN_SECONDS)


def test_h77_with_the_photos_away_only_what_needs_them_is_refused(hurt: Service, own_stack: RunningStack) -> None:
    gallery = new_gallery(hurt)
    one, other = people()[1:3]
    known = enrol(hurt, gallery, one.photo)
    stored = f"/v1/identities/{known['id']}/samples/{known['samples'][0]['id']}/photo"
    with photos_away(own_stack):
        refused = hurt.officer.post("/v1/identities", files=[part(other.photo)], data={"gallery": gallery})
        problem(refused, 503, "dependency-unavailable")
        assert int(refused.headers["retry-after"]) > 0
        assert hurt.officer.get(f"/v1/galleries/{gallery}").json()["counts"] == {"identities": 1, "samples": 1}
        assert verify(hurt.app, one.selfie, identity_id=known["id"]).json()["match"]
        assert identify(hurt.app, again(one.selfie), gallery=gallery).status_code == 200
        assert hurt.officer.patch(f"/v1/identities/{known['id']}", json={"full_name": "A"}).status_code == 200
        page = readiness(hurt)
        assert (page["http"], page["status"], page["checks"]["photos"]["status"]) == (200, "degraded", "down")
    assert hurt.officer.get(stored).status_code == 200
    assert enrol(hurt, gallery, other.photo)["status"] == "active"
    becomes(lambda: settled(hurt), RECOVERS_WITHIN_SECONDS)


def test_h79_h80_a_photo_that_is_lost_or_spoilt_is_said_to_be_and_is_never_another_one(
    hurt: Service, own_stack: RunningStack
) -> None:
    gallery = new_gallery(hurt)
    lost, other = (enrol(hurt, gallery, person.photo) for person in people()[1:3])

    def file_of(page: Page) -> Path:
        (found,) = (own_stack.data_dir / "photos").rglob(f"*{page['samples'][0]['id']}*")
        return found

    def view(page: Page) -> httpx.Response:
        return hurt.officer.get(f"/v1/identities/{page['id']}/samples/{page['samples'][0]['id']}/photo")

    file_of(lost).write_bytes(file_of(other).read_bytes())
    assert not view(lost).is_success
    file_of(lost).unlink()
    problem(view(lost), 410, "photo-missing")
    assert view(other).status_code == 200


def test_h75_with_mongodb_frozen_everything_is_refused_in_time_and_comes_back(
    hurt: Service, own_stack: RunningStack
) -> None:
    gallery = new_gallery(hurt)
    person = people()[1]
    known = enrol(hurt, gallery, person.photo)
    calls: list[Callable[[], httpx.Response]] = [
        lambda: hurt.officer.get(f"/v1/identities/{known['id']}"),
        lambda: hurt.officer.post("/v1/identities", files=[part(people()[2].photo)], data={"gallery": gallery}),
        lambda: verify(hurt.app, person.selfie, identity_id=known["id"]),
        lambda: identify(hurt.app, person.selfie, gallery=gallery),
        lambda: hurt.officer.delete(f"/v1/identities/{known['id']}", params={"reason": "asked for"}),
        lambda: hurt.anonymous.post(
            "/v1/auth/token", data={"grant_type": "password", "username": "a", "password": "b"}
        ),
        lambda: hurt.auditor.get("/v1/audit/events"),
    ]
    with frozen(own_stack, "mongod"):
        assert becomes(lambda: bool(readiness(hurt)["http"] == 503), TURNS_RED_WITHIN_SECONDS) >= 0
        page = readiness(hurt)
        assert (page["status"], page["checks"]["mongo"]["status"]) == ("not_ready", "down")
        for call in calls:
            began = time.monotonic()
            answer = call()
            assert time.monotonic() - began < GIVES_UP_WITHIN_SECONDS
            problem(answer, 503, "dependency-unavailable")
            assert int(answer.headers["retry-after"]) > 0
        assert hurt.anonymous.get("/health").status_code == 200
    becomes(lambda: settled(hurt), RECOVERS_WITHIN_SECONDS)
    assert identity(hurt, known["id"])["status"] == "active"
    assert hurt.officer.get(f"/v1/galleries/{gallery}").json()["counts"] == {"identities": 1, "samples": 1}
    assert verify(hurt.app, again(person.selfie), identity_id=known["id"]).json()["match"]
