"""A backup put in place under a running service: it leaves, waits, and comes back with what the backup held."""

import json
import subprocess
import time
from pathlib import Path

import httpx

from app.devstack.stack import idem
from tests.e2e.builders import enrol, identify, new_gallery, open_service, people
from tests.support.stacks import running_stack

BACK_WITHIN_SECONDS = 40.0


def test_h100_a_running_service_leaves_for_a_restore_and_comes_back_without_the_erased(
    tmp_path: Path, stack_environment: dict[str, str]
) -> None:
    ann, bob = people()[:2]
    folder = str(tmp_path / "backups")

    def command(*words: str) -> str:
        ended = subprocess.run(
            idem(*words, "--data-dir", str(tmp_path / "data"), "--json"), env=stack_environment, capture_output=True,
            text=True, timeout=120, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout.splitlines()[-1]

    with running_stack(tmp_path / "data", "--no-demo", environment=stack_environment) as stack:
        with open_service(stack.ready) as service:
            gallery = new_gallery(service)
            erased = enrol(service, gallery, ann.photo)
            made = json.loads(command("backup", folder))
            assert made["photos"] == 1
            lost = enrol(service, gallery, bob.photo)
            service.officer.delete(f"/v1/identities/{erased['id']}", params={"reason": "asked for"}).raise_for_status()
            before, caller = stack.pids(), service.officer
            done = json.loads(command("restore", folder, "--replace", "--yes"))
            assert (done["set_id"], done["erased_again"], len(done["log"])) == (made["id"], 1, 1)
            deadline = time.monotonic() + BACK_WITHIN_SECONDS
            while not _is_ready(stack.ready.url):
                assert time.monotonic() < deadline, stack.said
                time.sleep(0.2)
            after = stack.pids()
            assert all(after[name] != before[name] for name in ("api-1", "worker"))
            assert after["mongod"] == before["mongod"]
            assert caller.get("/v1/auth/me").status_code == 401, "sessions do not come back to life"
        with open_service(stack.ready) as service:
            for identity_id in (erased["id"], lost["id"]):
                assert service.officer.get(f"/v1/identities/{identity_id}").status_code == 404
            answer, deadline = (
                identify(service.officer, ann.photo, gallery=gallery),
                time.monotonic() + BACK_WITHIN_SECONDS,
            )
            while answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:  # the gallery is being read
                assert time.monotonic() < deadline, answer.text
                time.sleep(0.2)
                answer = identify(service.officer, ann.photo, gallery=gallery)
            assert answer.json()["candidates"] == []
    # Where nobody serves, MongoDB alone is started: a restore that a power cut ended can go on.
    assert json.loads(command("check"))["findings"] == []


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=2).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False
