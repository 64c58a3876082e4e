"""Roles on the running service; every call by every role is tried without servers in between (test_every_route.py)."""

import time

import httpx

from tests.e2e.builders import Service, enrol, new_gallery, people, problem, user_with


def test_h42_a_role_opens_its_own_doors_only(service: Service) -> None:
    doors = {
        "/v1/users": [service.admin],
        "/v1/identities": [service.officer],
        "/v1/audit/events": [service.admin, service.auditor],
        "/v1/galleries": [service.admin, service.officer, service.app],
    }
    for path, may in doors.items():
        for caller in (service.admin, service.officer, service.auditor, service.app):
            if caller in may:
                assert caller.get(path).status_code == 200, path
            else:
                problem(caller.get(path), 403, "forbidden")
        answer = service.anonymous.get(path)
        problem(answer, 401, "unauthenticated")
        assert "www-authenticate" in answer.headers


def test_h41_somebody_in_a_foreign_gallery_is_as_unknown_as_nobody(service: Service) -> None:
    gallery = new_gallery(service)
    made = enrol(service, gallery, people()[1].photo)
    with user_with(service, "officer", galleries=[new_gallery(service)]) as stranger:
        for path in (f"/v1/identities/{made['id']}", f"/v1/galleries/{gallery}"):
            problem(stranger.get(path), 404, "not-found")
        problem(stranger.delete(f"/v1/identities/{made['id']}", params={"reason": "asked for"}), 404, "not-found")
    assert service.officer.get(f"/v1/identities/{made['id']}").json()["status"] == "active"


def test_two_roles_may_do_what_either_may(service: Service) -> None:
    with user_with(service, "officer", "auditor") as both:
        assert both.get("/v1/identities").status_code == 200
        assert both.get("/v1/audit/events").status_code == 200
        problem(both.get("/v1/users"), 403, "forbidden")
        assert both.get("/v1/auth/me").json()["roles"] == ["auditor", "officer"]


def test_h53_a_role_taken_away_or_an_account_removed_ends_within_a_second_on_every_process(service: Service) -> None:
    for change in ({"roles": ["auditor"]}, None):
        with user_with(service, "officer") as officer:
            path = f"/v1/users/{officer.get('/v1/auth/me').json()['id']}"
            assert officer.get("/v1/identities").status_code == 200
            answer = service.admin.delete(path) if change is None else service.admin.patch(path, json=change)
            assert answer.status_code in (200, 204)
            time.sleep(1)
            # New connections, so that both processes are asked.
            for _ in range(10):
                with httpx.Client(base_url=service.url, headers=officer.headers) as fresh:
                    problem(fresh.get("/v1/identities"), 401, "unauthenticated")
