"""Costly work of one caller delays another caller by one job. A search waits no longer than a comparison."""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.e2e.builders import Service, again, app_with, base64_of, enrol, identify, people, verify
from tests.e2e.test_cost_of_refusals import SIDE, png

FLOOD, ROUNDS = 12, 5
#: The machine of the tests runs other programs too.
SLACK_SECONDS = 0.5


def _timed(work: Callable[[], httpx.Response]) -> tuple[float, httpx.Response]:
    began = time.perf_counter()
    answer = work()
    return time.perf_counter() - began, answer


def test_a7_photos_of_25_megapixels_from_one_application_delay_another_one_by_one_job(
    service: Service, gallery: str
) -> None:
    person = people()[0]
    known = enrol(service, gallery, person.photo)
    bomb = png(SIDE, SIDE, 8, 2)

    def ask() -> float:
        seconds, answer = _timed(lambda: verify(service.app, again(person.selfie), identity_id=known["id"]))
        assert answer.status_code == httpx.codes.OK, answer.text
        return seconds

    with app_with(service, galleries=[gallery]) as other:

        def burden(number: int) -> float:
            form = {"photo_base64": base64_of(bomb + bytes([number])), "gallery": gallery}
            seconds, answer = _timed(lambda: other.post("/v1/identifications", json=form, timeout=120))
            assert answer.status_code in {httpx.codes.UNPROCESSABLE_ENTITY, httpx.codes.SERVICE_UNAVAILABLE}, (
                answer.text
            )
            return seconds

        ask()
        alone = statistics.median(ask() for _ in range(ROUNDS))
        longest = max(burden(0), burden(1))
        with ThreadPoolExecutor(FLOOD) as threads:
            flood = [threads.submit(burden, number) for number in range(FLOOD)]
            time.sleep(0.3)
            beside = []
            while len(beside) < ROUNDS and not all(one.done() for one in flood):
                beside.append(ask())
            last = max(one.result() for one in flood)
    assert beside, "the flood was over at once"
    assert statistics.median(beside) <= 2 * alone + longest + SLACK_SECONDS, (alone, longest, beside, last)


def test_r7_identification_waits_no_longer_than_verification_when_many_call(service: Service, gallery: str) -> None:
    person = people()[0]
    known = enrol(service, gallery, person.photo)

    def one(kind: str) -> float:
        photo = again(person.selfie)
        if kind == "verify":
            seconds, answer = _timed(lambda: verify(service.app, photo, identity_id=known["id"]))
        else:
            seconds, answer = _timed(lambda: identify(service.app, photo, gallery=gallery))
        assert answer.status_code == httpx.codes.OK, answer.text
        return seconds

    kinds = ["verify", "identify"] * 24
    with ThreadPoolExecutor(8) as threads:
        seconds = list(threads.map(one, kinds))
    verified = statistics.median(seconds[0::2])
    identified = statistics.median(seconds[1::2])
    assert identified <= 1.6 * verified + 0.1, (identified, verified)
