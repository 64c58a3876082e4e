"""`idem demo` on a running stack."""

import subprocess
from pathlib import Path

from app.devstack.demo import sample_people
from app.devstack.stack import idem
from tests.support.stacks import RunningStack


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, done."""
    return subprocess.run(idem("demo", *arguments), capture_output=True, text=True, check=False, timeout=120)


def test_the_demo_does_the_main_job_twice_over(stack: RunningStack) -> None:
    for _ in range(2):
        done = run_demo("--data-dir", str(stack.data_dir))
        assert done.returncode == 0, done.stdout + done.stderr
        for step in ("enrol again", "suspected_duplicate", "match True", "signature holds", "match False", "audit"):
            assert step in done.stdout


def folders(parent: Path) -> Path:
    """Three of the sample people, a folder each."""
    for person in sample_people()[:3]:
        own = parent / person.name
        own.mkdir(parents=True)
        (own / "1.jpg").write_bytes(person.photo)
        (own / "2.jpg").write_bytes(person.selfie)
    return parent


def test_the_demo_takes_a_folder_per_person(stack: RunningStack, tmp_path: Path) -> None:
    done = run_demo("--data-dir", str(stack.data_dir), "--photos", str(folders(tmp_path / "photos")))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Eileen Collins" in done.stdout


def test_a_step_that_goes_wrong_ends_with_its_name(stack: RunningStack, tmp_path: Path) -> None:
    photos = folders(tmp_path / "photos")
    first = min(photos.iterdir())
    (first / "1.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    done = run_demo("--data-dir", str(stack.data_dir), "--photos", str(photos))
    assert done.returncode == 1
    assert "step 'enrol'" in done.stderr
    assert "undecodable-image" in done.stderr


def test_without_a_stack_the_demo_says_what_to_start(tmp_path: Path) -> None:
    done = run_demo("--data-dir", str(tmp_path))
    assert done.returncode == 1
    assert "idem up" in done.stderr
