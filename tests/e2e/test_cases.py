"""Suspected duplicates over HTTP: cases, and what a person decides."""

import time

from tests.e2e.builders import (
    IDENTITY_FIELDS,
    NOBODY,
    Page,
    Service,
    again,
    enrol,
    identify,
    identity,
    new_gallery,
    people,
    problem,
    unique,
    user_with,
)

SETTLED_WITHIN_SECONDS = 20.0


def twins(service: Service, gallery: str) -> tuple[Page, Page, Page]:
    """One person enrolled twice: the first, the suspect, and the case."""
    person = people()[1]
    first, suspect = enrol(service, gallery, person.photo), enrol(service, gallery, person.selfie)
    assert suspect["status"] == "suspected_duplicate"
    return first, suspect, case_of(service, suspect)


def case_of(service: Service, suspect: Page) -> Page:
    """The case that the screening opened."""
    answer = service.officer.get(f"/v1/dedup/cases/{suspect['dedup']['case_id']}")
    assert answer.status_code == 200, answer.text
    page: Page = answer.json()
    return page


def test_a_case_shows_the_newcomer_and_whom_it_looks_like(service: Service, gallery: str) -> None:
    first, suspect, case = twins(service, gallery)
    assert set(case) == {
        "id", "gallery", "state", "newcomer", "candidates", "threshold", "created_at", "decided_at", "decided_by",
        "proposed_by", "proposals", "reason", "version", "candidate_count", "candidates_next_cursor",
    }  # fmt: skip
    assert (case["gallery"], case["state"], case["version"]) == (gallery, "open", 1)
    assert (case["decided_at"], case["decided_by"], case["reason"]) == (None, None, None)
    assert case["newcomer"] == suspect
    (candidate,) = case["candidates"]
    assert set(candidate) == {"identity", "score", "rank", "decision"}
    assert set(candidate["identity"]) == IDENTITY_FIELDS
    assert (candidate["identity"]["id"], candidate["rank"], candidate["decision"]) == (first["id"], 1, None)
    assert case["threshold"] <= candidate["score"] <= 1
    assert suspect["dedup"]["verdict"] == "suspected_duplicate"
    assert suspect["dedup"]["candidate_count"] == 1
    job = service.officer.get(f"/v1/dedup/jobs/{suspect['dedup']['job_id']}").json()
    assert [(c["identity_id"], c["rank"]) for c in job["candidates"]] == [(first["id"], 1)]


def test_cases_are_listed_by_state_the_oldest_first(service: Service, gallery: str) -> None:
    _, _, oldest = twins(service, gallery)
    newest = case_of(service, enrol(service, gallery, again(people()[1].photo)))

    def listed(**query: str) -> list[str]:
        answer = service.officer.get("/v1/dedup/cases", params={"gallery": gallery, **query})
        assert answer.status_code == 200, answer.text
        return [case["id"] for case in answer.json()["items"]]

    assert listed() == listed(state="open") == [oldest["id"], newest["id"]]
    assert listed(state="decided") == []
    page = service.officer.get("/v1/dedup/cases", params={"gallery": gallery, "limit": 1}).json()
    assert [case["id"] for case in page["items"]] == [oldest["id"]]
    assert listed(limit="1", cursor=page["next_cursor"]) == [newest["id"]]
    problem(service.officer.get("/v1/dedup/cases", params={"state": "closed"}), 422, "validation")


def decide(service: Service, case: Page, **decision: str) -> Page:
    """The case after a decision."""
    answer = service.officer.post(f"/v1/dedup/cases/{case['id']}/decision", json={"reason": "seen", **decision})
    assert answer.status_code == 200, answer.text
    page: Page = answer.json()
    return page


def test_distinct_people_are_both_active(service: Service, gallery: str) -> None:
    first, suspect, case = twins(service, gallery)
    decided = decide(service, case, decision="distinct")
    assert (decided["state"], decided["reason"], decided["version"]) == ("decided", "seen", 2)
    assert decided["decided_by"] == service.officer.get("/v1/auth/me").json()["id"]
    assert decided["decided_at"] >= case["created_at"]
    assert [c["decision"] for c in decided["candidates"]] == ["distinct"]
    assert {identity(service, page["id"])["status"] for page in (first, suspect)} == {"active"}
    found = identify(service.app, people()[1].selfie, gallery=gallery).json()["candidates"]
    assert {page["identity_id"] for page in found} == {first["id"], suspect["id"]}
    again_decided = service.officer.post(
        f"/v1/dedup/cases/{case['id']}/decision", json={"decision": "distinct", "reason": "x"}
    )
    problem(again_decided, 409, "conflict")


def test_h73_where_two_officers_must_agree_the_first_decision_is_a_proposal(service: Service) -> None:
    gallery = new_gallery(service, second_review=True)
    first, suspect, case = twins(service, gallery)
    proposed = decide(service, case, decision="distinct")
    assert (proposed["state"], proposed["decided_by"]) == ("open", None)
    (proposal,) = proposed["proposals"]
    me = service.officer.get("/v1/auth/me").json()["id"]
    assert set(proposal) == {"decision", "identity_id", "keep", "reason", "by", "at"}
    assert (proposal["decision"], proposal["identity_id"], proposal["by"]) == ("distinct", first["id"], me)
    body = {"decision": "distinct", "reason": "x"}
    problem(service.officer.post(f"/v1/dedup/cases/{case['id']}/decision", json=body), 409, "conflict")
    with user_with(service, "officer", galleries=[gallery]) as other:
        answer = other.post(f"/v1/dedup/cases/{case['id']}/decision", json=body)
        assert answer.status_code == 200, answer.text
        decided, them = answer.json(), other.get("/v1/auth/me").json()["id"]
    assert (decided["state"], decided["proposed_by"], decided["decided_by"]) == ("decided", me, them)
    assert decided["proposals"] == []
    assert identity(service, suspect["id"])["status"] == "active"


def test_of_duplicates_the_older_one_stays(service: Service, gallery: str) -> None:
    first, suspect, case = twins(service, gallery)
    decided = decide(service, case, decision="duplicate", identity_id=first["id"])
    assert decided["state"] == "decided"
    assert [c["decision"] for c in decided["candidates"]] == ["duplicate"]
    assert (identity(service, first["id"])["status"], identity(service, suspect["id"])["status"]) == (
        "active",
        "duplicate",
    )


def test_of_duplicates_the_newcomer_may_be_kept(service: Service, gallery: str) -> None:
    first, suspect, case = twins(service, gallery)
    decide(service, case, decision="duplicate", identity_id=first["id"], keep=suspect["id"])
    assert (identity(service, first["id"])["status"], identity(service, suspect["id"])["status"]) == (
        "duplicate",
        "active",
    )
    found = identify(service.app, people()[1].selfie, gallery=gallery).json()["candidates"]
    assert [page["identity_id"] for page in found] == [suspect["id"]]


def test_a_decision_must_fit_its_case(service: Service, gallery: str) -> None:
    first, _, case = twins(service, gallery)
    path = f"/v1/dedup/cases/{case['id']}/decision"
    for body in (
        {"decision": "duplicate", "reason": "x"},
        {"decision": "duplicate", "identity_id": NOBODY, "reason": "x"},
        {"decision": "duplicate", "identity_id": first["id"], "keep": NOBODY, "reason": "x"},
        {"decision": "maybe", "reason": "x"},
        {"decision": "distinct"},
        {"decision": "distinct", "reason": ""},
        {"decision": "distinct", "reason": "x", "force": True},
    ):
        problem(service.officer.post(path, json=body), 422, "validation")
    assert case_of(service, case["newcomer"]) == case
    missing = service.officer.post(f"/v1/dedup/cases/{NOBODY}/decision", json={"decision": "distinct", "reason": "x"})
    problem(missing, 404, "not-found")


def test_candidates_are_decided_one_by_one_and_an_undecided_one_keeps_the_newcomer_out(
    service: Service, gallery: str
) -> None:
    first, second, _ = twins(service, gallery)
    third = enrol(service, gallery, again(people()[1].photo))
    case = case_of(service, third)
    assert {c["identity"]["id"] for c in case["candidates"]} == {first["id"], second["id"]}
    path = f"/v1/dedup/cases/{case['id']}/decision"
    keep_me = {"decision": "duplicate", "identity_id": second["id"], "keep": third["id"], "reason": "x"}
    problem(service.officer.post(path, json=keep_me), 409, "undecided-candidates")
    partly = decide(service, case, decision="distinct", identity_id=second["id"])
    assert partly["state"] == "open"
    assert identity(service, third["id"])["status"] == "suspected_duplicate"
    problem(
        service.officer.post(path, json={"decision": "distinct", "identity_id": second["id"], "reason": "x"}),
        409,
        "conflict",
    )
    assert decide(service, case, decision="distinct")["state"] == "decided"
    assert identity(service, third["id"])["status"] == "active"


def test_a_decision_with_its_key_is_made_once(service: Service, gallery: str) -> None:
    _, _, case = twins(service, gallery)
    headers = {"Idempotency-Key": unique("key")}
    path, body = f"/v1/dedup/cases/{case['id']}/decision", {"decision": "distinct", "reason": "x"}
    first = service.officer.post(path, json=body, headers=headers)
    assert first.status_code == 200
    assert service.officer.post(path, json=body, headers=headers).json() == first.json()


def test_erasing_a_candidate_has_its_newcomer_screened_again(service: Service, gallery: str) -> None:
    first, suspect, case = twins(service, gallery)
    assert service.officer.delete(f"/v1/identities/{first['id']}", params={"reason": "asked for"}).status_code == 200
    deadline = time.monotonic() + SETTLED_WITHIN_SECONDS
    while (page := identity(service, suspect["id"]))["status"] != "active":
        assert page["status"] in ("pending", "suspected_duplicate")
        assert time.monotonic() < deadline, page
    assert page["dedup"]["verdict"] == "unique"
    closed = service.officer.get(f"/v1/dedup/cases/{case['id']}").json()
    assert (closed["state"], closed["candidates"][0]["identity"]) == ("decided", None)


def test_erasing_the_newcomer_closes_its_case_and_leaves_the_candidate(service: Service, gallery: str) -> None:
    first, suspect, case = twins(service, gallery)
    assert service.officer.delete(f"/v1/identities/{suspect['id']}", params={"reason": "asked for"}).status_code == 200
    closed = service.officer.get(f"/v1/dedup/cases/{case['id']}").json()
    assert (closed["state"], closed["newcomer"]) == ("decided", None)
    assert identity(service, first["id"])["status"] == "active"


def test_an_unknown_case_or_job_is_not_found(service: Service) -> None:
    problem(service.officer.get(f"/v1/dedup/cases/{NOBODY}"), 404, "not-found")
    problem(service.officer.get(f"/v1/dedup/jobs/{NOBODY}"), 404, "not-found")
