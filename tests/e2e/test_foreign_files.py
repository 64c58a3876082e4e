"""Foreign files in the places of a running stack, and a second stack with the same places. No foreign file is lost."""

import json
import os
import subprocess
import time
import uuid
from pathlib import Path

from app.devstack.stack import idem
from tests.e2e.builders import enrol, identify, new_gallery, open_service, people
from tests.support.stacks import running_stack, start

#: Two looks of the worker at the folders.
SWEPT_WITHIN_SECONDS = 11.0
REFUSED_WITHIN_SECONDS = 120.0


def _plant(root: Path) -> dict[Path, bytes]:
    """Foreign files that are two days old."""
    names = [
        "gallery/identity/sample", "home/ann/thesis.txt", "notes.txt", "notes", "deep/a/b/c/d/e/f", "photos/a", "other_index/b",
        f"{uuid.uuid4()}/{uuid.uuid4()}/{uuid.uuid4()}", f"{uuid.uuid4()}/{uuid.uuid4()}-3/MANIFEST.json",
    ]  # fmt: skip
    two_days_ago = time.time() - 2 * 24 * 3600
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"foreign")
        os.utime(path, (two_days_ago, two_days_ago))
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_running_stack_keeps_foreign_files_and_a_second_stack_in_its_places_is_refused(
    tmp_path: Path, stack_environment: dict[str, str]
) -> None:
    ann = people()[0]
    first, second = tmp_path / "first", tmp_path / "second"
    places = {"STORAGE_PATH": "photos", "VECTOR_DB_PATH": "index", "INDEX_CACHE_PATH": "index-copies"}
    with (
        running_stack(first, "--no-demo", environment=stack_environment) as stack,
        open_service(stack.ready) as service,
    ):
        gallery = new_gallery(service)
        known = enrol(service, gallery, ann.photo)
        planted = {name: _plant(first / name) for name in places.values()}
        time.sleep(SWEPT_WITHIN_SECONDS)
        beside = stack_environment | {setting: str(first / name) for setting, name in places.items()}
        log = tmp_path / "second.log"
        refused = start(second, tmp_path / "second.ready", log, "--no-demo", environment=beside)
        assert refused.wait(REFUSED_WITHIN_SECONDS) == 78, log.read_text()
        assert "STORAGE_PATH" in log.read_text()
        assert "belongs to another store" in log.read_text()
        checked = subprocess.run(
            idem("check", "--repair", "--json", "--data-dir", str(first)), env=stack_environment, capture_output=True,
            text=True, timeout=120, check=False,
        )  # fmt: skip
        assert checked.returncode == 1, checked.stderr
        counts = json.loads(checked.stdout.splitlines()[-1])["counts"]
        assert counts == {"photo-foreign": 9, "index-foreign": 18}
        for files in planted.values():
            for path, data in files.items():
                if data == b"foreign":
                    assert path.read_bytes() == data
        (candidate,) = identify(service.officer, ann.photo, gallery=gallery).json()["candidates"]
        assert candidate["identity_id"] == known["id"]
