"""Whole-gallery scans over HTTP: started, followed, stopped, read, and put before a person."""

import json
import subprocess
import time

from app.devstack.stack import idem
from tests.e2e.builders import (
    NOBODY,
    TIMEOUT_SECONDS,
    Page,
    Service,
    again,
    app_with,
    enrol,
    identity,
    new_gallery,
    people,
    problem,
    unique,
    user_with,
)
from tests.support.stacks import RunningStack

DONE_WITHIN_SECONDS = 30.0
#: So high that no second enrolment is noticed.
BLIND, SEEING = 0.99, 0.4

SCAN_FIELDS = {
    "id", "kind", "gallery", "state", "progress", "threshold", "since_seq", "upto_seq", "pairs", "rate", "seconds_left",
    "reason", "created_at", "created_by", "started_at", "finished_at",
}  # fmt: skip


def unnoticed_twins(service: Service) -> tuple[str, Page, Page]:
    """A gallery in which a person is active twice, and two strangers; the two identities, the earlier first."""
    gallery = new_gallery(service, dedup_threshold=BLIND)
    enrol(service, gallery, people()[0].photo)
    first = enrol(service, gallery, people()[1].photo, external_ref=unique("ref"))
    second = enrol(service, gallery, people()[1].selfie)
    enrol(service, gallery, people()[2].photo)
    assert {first["status"], second["status"]} == {"active"}
    return gallery, first, second


def started(service: Service, gallery: str, threshold: float | None = SEEING) -> Page:
    answer = service.officer.post("/v1/dedup/scans", json={"gallery": gallery, "threshold": threshold})
    assert answer.status_code == 202, answer.text
    page: Page = answer.json()
    assert answer.headers["location"] == f"/v1/dedup/scans/{page['id']}"
    return page


def read(service: Service, path: str) -> Page:
    answer = service.officer.get(path)
    assert answer.status_code == 200, answer.text
    page: Page = answer.json()
    return page


def scanned(service: Service, gallery: str, threshold: float | None = SEEING) -> Page:
    """A scan of the gallery after the workers are through with it."""
    scan = started(service, gallery, threshold)
    deadline = time.monotonic() + DONE_WITHIN_SECONDS
    while (page := read(service, f"/v1/dedup/scans/{scan['id']}"))["state"] != "done":
        assert page["state"] in ("queued", "running"), page
        assert time.monotonic() < deadline, page
        time.sleep(0.1)
    return page


def test_a_scan_finds_who_is_in_twice_and_puts_it_before_a_person(service: Service) -> None:
    gallery, first, second = unnoticed_twins(service)
    scan = scanned(service, gallery)
    assert set(scan) == SCAN_FIELDS
    assert (scan["kind"], scan["gallery"], scan["pairs"]) == ("scan", gallery, 1)
    assert (scan["since_seq"], scan["upto_seq"], scan["progress"]) == (0, 4, {"done": 1, "total": 1})
    assert scan["created_by"] == read(service, "/v1/auth/me")["id"]
    assert (scan["seconds_left"], scan["reason"]) == (None, None)
    assert scan["rate"] > 0
    assert scan["created_at"] <= scan["started_at"] <= scan["finished_at"]

    pairs = read(service, f"/v1/dedup/scans/{scan['id']}/pairs")
    (pair,) = pairs["items"]
    assert pairs["next_cursor"] is None
    assert pair["identities"] == [
        {"identity_id": first["id"], "external_ref": first["external_ref"], "status": "active"},
        {"identity_id": second["id"], "external_ref": None, "status": "active"},
    ]
    assert SEEING <= pair["score"] <= 1
    assert pair["decision"] is None
    (cluster,) = read(service, f"/v1/dedup/scans/{scan['id']}/clusters")["items"]
    assert {person["identity_id"] for person in cluster["identities"]} == {first["id"], second["id"]}
    assert (cluster["size"], cluster["links"]) == (2, 1)
    assert len(cluster["weak_links"]) == (pair["score"] < SEEING + 0.05)

    cases = f"/v1/dedup/scans/{scan['id']}/cases"
    assert service.officer.post(cases).json() == {"opened": 1, "existing": 0, "decided": 0}
    assert service.officer.post(cases).json() == {"opened": 0, "existing": 1, "decided": 0}
    (case,) = read(service, f"/v1/dedup/cases?gallery={gallery}&state=open")["items"]
    assert case["newcomer"]["id"] == second["id"]
    assert [c["identity"]["id"] for c in case["candidates"]] == [first["id"]]
    assert identity(service, second["id"])["status"] == "active"
    decision = {"decision": "duplicate", "identity_id": first["id"], "reason": "the same person"}
    answer = service.officer.post(f"/v1/dedup/cases/{case['id']}/decision", json=decision)
    assert (answer.status_code, answer.json()["state"]) == (200, "decided")
    assert [identity(service, page["id"])["status"] for page in (first, second)] == ["active", "duplicate"]
    assert service.officer.post(cases).json() == {"opened": 0, "existing": 0, "decided": 1}
    (pair,) = read(service, f"/v1/dedup/scans/{scan['id']}/pairs")["items"]
    assert pair["decision"] == "duplicate"


def test_a_scan_uses_the_gallery_s_own_threshold_where_none_is_named(service: Service) -> None:
    gallery, _, _ = unnoticed_twins(service)
    scan = scanned(service, gallery, None)
    assert (scan["threshold"], scan["pairs"]) == (BLIND, 0)
    clusters = read(service, f"/v1/dedup/scans/{scan['id']}/clusters")
    assert (clusters["items"], clusters["next_cursor"]) == ([], None)
    assert clusters["as_of"] >= scan["finished_at"]


def test_a_scan_is_also_found_among_the_jobs(service: Service, gallery: str) -> None:
    scan = scanned(service, gallery)
    job = read(service, f"/v1/dedup/jobs/{scan['id']}")
    assert (job["kind"], job["state"], job["progress"]) == ("scan", "done", scan["progress"])
    assert (job["verdict"], job["candidates"], job["as_of_seq"]) == (None, [], scan["upto_seq"])


def test_pairs_and_clusters_come_in_pages_the_most_telling_first(service: Service) -> None:
    """Suspects are in the gallery as well: a scan looks at everybody, whatever their status."""
    gallery = new_gallery(service)
    for person, times in ((people()[0], 3), (people()[1], 2)):
        for _ in range(times):
            enrol(service, gallery, again(person.photo))
    scan = scanned(service, gallery)
    for kind, count in (("pairs", 4), ("clusters", 2)):
        path = f"/v1/dedup/scans/{scan['id']}/{kind}"
        whole = read(service, path)["items"]
        assert len(whole) == count
        paged, cursor = [], ""
        while cursor is not None:
            page = read(service, f"{path}?limit=1{f'&cursor={cursor}' if cursor else ''}")
            paged += page["items"]
            cursor = page["next_cursor"]
        assert paged == whole
        problem(service.officer.get(path, params={"cursor": "e30"}), 422, "validation")
    scores = [pair["score"] for pair in read(service, f"/v1/dedup/scans/{scan['id']}/pairs")["items"]]
    assert scores == sorted(scores, reverse=True)
    clusters = read(service, f"/v1/dedup/scans/{scan['id']}/clusters")["items"]
    assert [len(cluster["identities"]) for cluster in clusters] == [3, 2]
    cursor = read(service, f"/v1/dedup/scans/{scan['id']}/pairs?limit=1")["next_cursor"]
    foreign = service.officer.get(f"/v1/dedup/scans/{scan['id']}/clusters", params={"cursor": cursor})
    problem(foreign, 422, "validation")


def test_whoever_is_erased_is_in_no_pair_any_more(service: Service) -> None:
    gallery, first, _ = unnoticed_twins(service)
    scan = scanned(service, gallery)
    assert service.officer.delete(f"/v1/identities/{first['id']}", params={"reason": "asked for"}).status_code == 200
    assert read(service, f"/v1/dedup/scans/{scan['id']}/pairs")["items"] == []
    assert read(service, f"/v1/dedup/scans/{scan['id']}/clusters")["items"] == []
    assert read(service, f"/v1/dedup/scans/{scan['id']}")["pairs"] == 0


def test_a_scan_that_has_ended_is_neither_paused_nor_resumed_nor_cancelled(service: Service, gallery: str) -> None:
    scan = scanned(service, gallery)
    for step in ("pause", "resume", "cancel"):
        problem(service.officer.post(f"/v1/dedup/scans/{scan['id']}/{step}"), 409, "conflict")


def test_a_stopped_scan_says_so(service: Service, gallery: str) -> None:
    """Whoever is first, the worker or the officer: the answer fits."""
    for person in people()[:3]:
        enrol(service, gallery, person.photo)
    scan = started(service, gallery)
    paused = service.officer.post(f"/v1/dedup/scans/{scan['id']}/pause")
    if paused.status_code == 200:
        assert paused.json()["state"] == "paused"
        resumed = service.officer.post(f"/v1/dedup/scans/{scan['id']}/resume")
        # A worker may already have taken the scan when the answer is written.
        assert resumed.status_code == 200
        assert resumed.json()["state"] in ("queued", "running", "done")
    cancelled = service.officer.post(f"/v1/dedup/scans/{scan['id']}/cancel")
    ended = read(service, f"/v1/dedup/scans/{scan['id']}")["state"]
    assert (cancelled.status_code, ended) in ((200, "cancelled"), (409, "done"))


def test_a_scan_with_its_key_is_started_once(service: Service, gallery: str) -> None:
    headers, body = {"Idempotency-Key": unique("key")}, {"gallery": gallery}
    first, second = (service.officer.post("/v1/dedup/scans", json=body, headers=headers) for _ in range(2))
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["id"] == second.json()["id"]
    keyed = {"Idempotency-Key": unique("key")}
    cases = f"/v1/dedup/scans/{first.json()['id']}/cases"
    opened, repeated = (service.officer.post(cases, headers=keyed) for _ in range(2))
    assert (opened.status_code, opened.json()) == (repeated.status_code, repeated.json())


def test_a_scan_of_what_one_may_not_see_is_not_found(service: Service, gallery: str) -> None:
    scan = scanned(service, gallery)
    with user_with(service, "officer", galleries=[]) as stranger:
        problem(stranger.post("/v1/dedup/scans", json={"gallery": gallery}), 404, "not-found")
        for path in ("", "/pairs", "/clusters"):
            problem(stranger.get(f"/v1/dedup/scans/{scan['id']}{path}"), 404, "not-found")
        for step in ("pause", "resume", "cancel", "cases"):
            problem(stranger.post(f"/v1/dedup/scans/{scan['id']}/{step}"), 404, "not-found")
        problem(stranger.get(f"/v1/dedup/jobs/{scan['id']}"), 404, "not-found")
    with app_with(service) as relying:
        problem(relying.post("/v1/dedup/scans", json={"gallery": gallery}), 403, "forbidden")
    problem(service.officer.get(f"/v1/dedup/scans/{NOBODY}"), 404, "not-found")


def test_what_is_no_scan_is_refused(service: Service, gallery: str) -> None:
    for body in (
        {},
        {"gallery": gallery, "threshold": 0},
        {"gallery": gallery, "threshold": 1},
        {"gallery": gallery, "threshold": "high"},
        {"gallery": gallery, "full": True},
    ):
        problem(service.officer.post("/v1/dedup/scans", json=body), 422, "validation")
    problem(service.officer.post("/v1/dedup/scans", json={"gallery": "nowhere"}), 404, "not-found")


def test_the_command_scans_here_and_now(service: Service, stack: RunningStack) -> None:
    gallery, first, second = unnoticed_twins(service)
    command = idem("dedup", "scan", "--gallery", gallery, "--threshold", str(SEEING), "--data-dir", str(stack.data_dir))
    ended = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True, timeout=TIMEOUT_SECONDS)
    told = json.loads(ended.stdout)
    assert (told["gallery"], told["state"], told["pairs"], told["clusters"]) == (gallery, "done", 1, 1)
    (pair,) = read(service, f"/v1/dedup/scans/{told['id']}/pairs")["items"]
    assert [person["identity_id"] for person in pair["identities"]] == [first["id"], second["id"]]
    spoken = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_SECONDS)
    assert "pairs: 1, clusters: 1" in " ".join(spoken.stdout.split())
    absent = [*command[:-1], str(stack.data_dir / "nothing")]
    refused = subprocess.run(absent, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    assert refused.returncode != 0
    assert "No stack is running" in refused.stderr
