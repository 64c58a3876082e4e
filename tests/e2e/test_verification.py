"""1:1 over HTTP: a selfie against one claimed identity, and what the relying application gets for it."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import jwt
import pytest
from PIL import Image

from tests.e2e.builders import (
    NOBODY,
    QUALITY_FIELDS,
    Page,
    Service,
    again,
    app_with,
    base64_of,
    encoded,
    enrol,
    jpeg,
    new_gallery,
    opened,
    part,
    people,
    portrayed,
    problem,
    unique,
    verify,
)

ATTEMPTS_BEFORE_WAIT = 5


def claims_of(service: Service, assertion: str, audience: str) -> Page:
    """The assertion's claims, checked against the published keys as a relying application would."""
    keys = {key["kid"]: key for key in service.anonymous.get("/.well-known/jwks.json").json()["keys"]}
    key = jwt.PyJWK(keys[jwt.get_unverified_header(assertion)["kid"]])
    claims: Page = jwt.decode(assertion, key, algorithms=["EdDSA"], audience=audience)
    return claims


def matched(answer: httpx.Response) -> bool:
    """Whether it was a match."""
    assert answer.status_code == 200, answer.text
    return bool(answer.json()["match"])


def test_everybody_is_themselves_and_nobody_else(service: Service, gallery: str) -> None:
    everybody = list(portrayed())
    ids = [enrol(service, gallery, person.photo)["id"] for person in everybody]
    for number, person in enumerate(everybody):
        assert matched(verify(service.app, person.selfie, identity_id=ids[number])), person.name
        assert not matched(verify(service.app, person.selfie, identity_id=ids[number - 1])), person.name


def test_a_match_is_answered_with_a_signed_assertion(service: Service, gallery: str) -> None:
    person = people()[1]
    made = enrol(service, gallery, person.photo, external_ref="R1")
    answer = verify(service.app, person.selfie, external_ref="R1", gallery=gallery, nonce="n-123")
    assert answer.status_code == 200, answer.text
    page = answer.json()
    assert set(page) == {
        "match", "identity_id", "score", "threshold", "fmr", "liveness", "quality", "flags", "faces_found", "box",
        "decision_id", "assertion",
    }  # fmt: skip
    assert (page["match"], page["identity_id"]) == (True, made["id"])
    assert page["score"] >= page["threshold"]
    assert page["score"] == round(page["score"], 2)
    assert 0 <= page["fmr"] <= 1e-3
    assert set(page["quality"]) == QUALITY_FIELDS
    claims = claims_of(service, page["assertion"], service.client_id)
    assert set(claims) == {
        "iss", "sub", "aud", "iat", "exp", "jti", "nonce", "amr", "score", "fmr", "gallery", "contract",
        "flags", "challenged", "live",
    }  # fmt: skip
    assert (claims["sub"], claims["aud"], claims["nonce"]) == (made["id"], service.client_id, "n-123")
    assert (claims["amr"], claims["gallery"], claims["score"]) == (["face"], gallery, page["score"])
    assert claims["exp"] - claims["iat"] == 60
    assert claims["contract"] == service.app.get(f"/v1/galleries/{gallery}").json()["model"]["contract"]


def test_h67_a_non_match_is_answered_with_a_coarse_score_and_no_assertion(service: Service, gallery: str) -> None:
    made = enrol(service, gallery, people()[1].photo)
    page = verify(service.app, people()[2].photo, identity_id=made["id"]).json()
    assert (page["match"], page["assertion"], page["identity_id"]) == (False, None, made["id"])
    assert page["score"] < page["threshold"]
    assert page["score"] == round(page["score"], 2)


def test_h67_an_officer_sees_the_whole_score(service: Service, gallery: str) -> None:
    made = enrol(service, gallery, people()[1].photo)
    score = verify(service.officer, people()[1].selfie, identity_id=made["id"]).json()["score"]
    assert score != round(score, 2)


def test_h61_the_same_selfie_serves_once_for_an_identity(service: Service, gallery: str) -> None:
    person = people()[1]
    made = enrol(service, gallery, person.photo)
    assert matched(verify(service.app, person.selfie, identity_id=made["id"]))
    problem(verify(service.app, person.selfie, identity_id=made["id"]), 409, "replayed-photo")
    other = enrol(service, new_gallery(service), person.photo)
    assert matched(verify(service.app, person.selfie, identity_id=other["id"]))
    assert matched(verify(service.app, again(person.selfie), identity_id=made["id"]))


def test_h61_of_ten_presentations_of_one_selfie_at_once_one_is_answered(service: Service, gallery: str) -> None:
    person = people()[1]
    made = enrol(service, gallery, person.photo)
    with ThreadPoolExecutor(10) as crowd:
        answers = list(crowd.map(lambda _: verify(service.app, person.selfie, identity_id=made["id"]), range(10)))
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 9


def test_a_repetition_with_its_key_gets_the_first_answer_and_is_no_replay(service: Service, gallery: str) -> None:
    person = people()[1]
    made = enrol(service, gallery, person.photo)
    form = {"identity_id": made["id"]}
    key = {"Idempotency-Key": unique("key")}

    def ask() -> httpx.Response:
        return service.app.post("/v1/verifications", files=[part(person.selfie)], data=form, headers=key)

    first, second = ask(), ask()
    assert first.status_code == 200
    assert second.json() == first.json()


@pytest.mark.parametrize("change", ["revoke", "suspect"])
def test_a_claim_on_somebody_who_is_not_active_is_no_match(service: Service, gallery: str, change: str) -> None:
    person = people()[1]
    made = enrol(service, gallery, person.photo)
    if change == "revoke":
        service.officer.post(f"/v1/identities/{made['id']}/revoke", json={"reason": "lost"})
    else:
        made = enrol(service, gallery, again(person.photo))
        assert made["status"] == "suspected_duplicate"
    page = verify(service.app, person.selfie, identity_id=made["id"]).json()
    assert (page["match"], page["score"], page["fmr"], page["assertion"]) == (False, None, None, None)


def test_h65_after_five_non_matches_one_must_wait_until_an_officer_resets_the_attempts(
    service: Service, gallery: str
) -> None:
    person, stranger = people()[1], people()[2]
    made = enrol(service, gallery, person.photo)
    for _ in range(ATTEMPTS_BEFORE_WAIT):
        assert not matched(verify(service.app, again(stranger.photo), identity_id=made["id"]))
    began = time.monotonic()
    refused = verify(service.app, again(person.selfie), identity_id=made["id"])
    problem(refused, 429, "attempts-exhausted")
    assert 0 < int(refused.headers["retry-after"]) <= 31
    assert time.monotonic() - began < 2
    other = enrol(service, gallery, people()[3].photo)
    assert matched(verify(service.app, people()[3].selfie, identity_id=other["id"]))
    assert service.officer.post(f"/v1/identities/{made['id']}/attempts:reset").status_code == 200
    assert matched(verify(service.app, again(person.selfie), identity_id=made["id"]))


def test_a_match_forgets_earlier_non_matches(service: Service, gallery: str) -> None:
    person, stranger = people()[1], people()[2]
    made = enrol(service, gallery, person.photo)
    for _ in range(2):
        for _ in range(ATTEMPTS_BEFORE_WAIT - 1):
            assert not matched(verify(service.app, again(stranger.photo), identity_id=made["id"]))
        assert matched(verify(service.app, again(person.selfie), identity_id=made["id"]))


def test_a_claim_names_one_identity_that_is_there(service: Service, gallery: str) -> None:
    photo = people()[1].photo
    problem(verify(service.app, photo), 422, "validation")
    problem(verify(service.app, photo, identity_id=NOBODY, external_ref="R"), 422, "validation")
    problem(verify(service.app, photo, identity_id=NOBODY), 404, "not-found")
    problem(verify(service.app, photo, external_ref="R9", gallery=gallery), 404, "not-found")
    problem(verify(service.app, photo, external_ref="R9", gallery="nowhere"), 404, "not-found")
    problem(verify(service.app, photo, identity_id=NOBODY, threshold="0"), 422, "validation")


def test_an_assertion_is_made_for_one_of_the_client_s_audiences(service: Service, gallery: str) -> None:
    person = people()[1]
    made = enrol(service, gallery, person.photo)
    with app_with(service, audiences=["https://bank.example"]) as app:
        asked = {"identity_id": made["id"], "audience": "https://bank.example"}
        assertion = verify(app, person.selfie, **asked).json()["assertion"]
        assert claims_of(service, assertion, "https://bank.example")["aud"] == "https://bank.example"
        with pytest.raises(jwt.InvalidAudienceError):
            claims_of(service, assertion, service.client_id)
        foreign = verify(app, again(person.selfie), identity_id=made["id"], audience="https://other.example")
        problem(foreign, 422, "validation")


def test_a_selfie_may_come_as_json(service: Service, gallery: str) -> None:
    person = people()[1]
    made = enrol(service, gallery, person.photo)
    body = {"identity_id": made["id"], "photo_base64": base64_of(person.selfie)}
    assert matched(service.app.post("/v1/verifications", json=body))


def test_a_gallery_s_own_threshold_decides(service: Service) -> None:
    gallery = new_gallery(service, verify_threshold=0.999)
    person = people()[1]
    made = enrol(service, gallery, person.photo)
    page = verify(service.app, person.selfie, identity_id=made["id"]).json()
    assert (page["match"], page["threshold"]) == (False, 0.999)


def copies(photo: bytes) -> dict[str, bytes]:
    """The photo once more: coded again, without its outermost pixels, mirrored."""
    picture = opened(photo)
    cut = picture.crop((1, 1, picture.width, picture.height))
    mirror = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return {
        "again": jpeg(picture, quality=80),
        "cut": jpeg(cut),
        "mirror": jpeg(mirror),
        "webp": encoded(picture, "WEBP"),
    }


def test_h62_a_selfie_coded_again_cut_or_mirrored_is_flagged(service: Service, gallery: str) -> None:
    person = people()[1]
    made = enrol(service, gallery, person.photo)
    first = verify(service.app, person.selfie, identity_id=made["id"])
    assert matched(first)
    assert "near-copy" not in first.json()["flags"]
    for kind, copy in copies(person.selfie).items():
        answer = verify(service.app, copy, identity_id=made["id"])
        assert matched(answer), kind
        assert "near-copy" in answer.json()["flags"], kind


def test_h63_an_enrolment_photo_as_selfie_is_flagged(service: Service, gallery: str) -> None:
    person = people()[1]
    made = enrol(service, gallery, person.photo)
    kept = service.officer.get(f"/v1/identities/{made['id']}/samples/{made['samples'][0]['id']}/photo").content
    for kind, copy in {"itself": person.photo, "as it is kept": kept, **copies(person.photo)}.items():
        page = verify(service.app, copy, identity_id=made["id"]).json()
        assert "probe-equals-reference" in page["flags"], kind


def test_h62_h63_a_gallery_may_refuse_near_copies(service: Service) -> None:
    person, stranger = people()[1], people()[2]
    made = enrol(service, new_gallery(service, near_copies="refuse"), person.photo)
    problem(verify(service.app, again(person.photo), identity_id=made["id"]), 409, "replayed-photo")
    assert not matched(verify(service.app, stranger.photo, identity_id=made["id"]))
    problem(verify(service.app, copies(stranger.photo)["cut"], identity_id=made["id"]), 409, "replayed-photo")


def test_h64_a_nonce_binds_a_selfie(service: Service) -> None:
    gallery = new_gallery(service, require_nonce=True)
    person = people()[1]
    made = enrol(service, gallery, person.photo)

    def nonce(caller: httpx.Client, **asked: str) -> str:
        answer = caller.post("/v1/challenges", json={"gallery": gallery, **asked})
        assert answer.status_code == 201, answer.text
        page = answer.json()
        assert set(page) == {"nonce", "expires_at"}
        return str(page["nonce"])

    def ask(text: str | None) -> httpx.Response:
        form = {"identity_id": made["id"]} | ({} if text is None else {"nonce": text})
        return verify(service.app, again(person.selfie), **form)

    for refused in (None, "4711", nonce(service.officer)):
        problem(ask(refused), 409, "nonce-invalid")
    good = nonce(service.app, identity_id=made["id"])
    answer = ask(good)
    assert matched(answer)
    assert claims_of(service, answer.json()["assertion"], service.client_id)["nonce"] == good
    problem(ask(good), 409, "nonce-invalid")


def test_h64_a_repetition_with_its_key_is_answered_although_the_nonce_is_used(service: Service) -> None:
    gallery = new_gallery(service, require_nonce=True)
    person = people()[1]
    made = enrol(service, gallery, person.photo)
    challenge = {"Idempotency-Key": unique("key")}
    given = service.app.post("/v1/challenges", json={"gallery": gallery}, headers=challenge)
    problem(service.app.post("/v1/challenges", json={"gallery": gallery}, headers=challenge), 409, "already-created")
    form, key = {"identity_id": made["id"], "nonce": given.json()["nonce"]}, {"Idempotency-Key": unique("key")}
    first, second = (
        service.app.post("/v1/verifications", files=[part(person.selfie)], data=form, headers=key) for _ in range(2)
    )
    assert first.status_code == 200, first.text
    assert second.json() == first.json()


def test_a_challenge_is_for_somebody_whom_the_caller_may_see(service: Service, gallery: str) -> None:
    made = enrol(service, gallery, people()[1].photo)
    problem(service.app.post("/v1/challenges", json={"gallery": "nowhere"}), 404, "not-found")
    problem(service.app.post("/v1/challenges", json={"gallery": gallery, "identity_id": NOBODY}), 404, "not-found")
    elsewhere = {"gallery": "default", "identity_id": made["id"]}
    problem(service.app.post("/v1/challenges", json=elsewhere), 404, "not-found")
    problem(service.app.post("/v1/challenges", json={"gallery": gallery, "life": 9}), 422, "validation")
