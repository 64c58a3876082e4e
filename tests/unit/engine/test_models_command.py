"""`idem models`: what is here, what can be fetched, and what to do where nothing can."""

import hashlib
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import models
from app.engine.packs import OFFICIAL_DIGESTS, sha256_of
from tests.support.packs import arcface_like, scrfd_like


class Quiet(SimpleHTTPRequestHandler):
    """A file server that does not log."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A release of a made-up buffalo_sc, with its digests published."""
    folder = tmp_path / "published"
    made = {"det_500m.onnx": scrfd_like(folder / "d.onnx"), "w600k_mbf.onnx": arcface_like(folder / "r.onnx")}
    with zipfile.ZipFile(folder / "buffalo_sc.zip", "w") as archive:
        for name, file in made.items():
            archive.write(file, f"buffalo_sc/{name}")
            monkeypatch.setitem(OFFICIAL_DIGESTS, name, sha256_of(file))
        archive.writestr("../escape.onnx", b"outside")
    publish(folder / "buffalo_sc.zip", monkeypatch)
    return folder


def publish(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models.SOURCES["buffalo_sc"]
    download = replace(source.downloads[0], sha256=sha256_of(archive))
    monkeypatch.setitem(models.SOURCES, "buffalo_sc", replace(source, downloads=(download,)))


@pytest.fixture
def server(published: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(published))) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join()


@pytest.fixture
def model_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "models"
    monkeypatch.setenv("MODEL_DIR", str(folder))
    return folder


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(models.app, list(words))
    return result.exit_code, " ".join((result.stdout + result.stderr).split())


def test_a_pack_is_pulled_from_a_server_checked_and_usable(model_dir: Path, server: str) -> None:
    code, said = run("pull", "buffalo_sc", "--accept-licence", "--mirror", server)
    assert code == 0, said
    assert {file.name for file in (model_dir / "buffalo_sc").iterdir()} == {"det_500m.onnx", "w600k_mbf.onnx"}
    assert [file.name for file in model_dir.iterdir()] == ["buffalo_sc"]
    assert "FACE_MODEL=buffalo_sc" in said
    code, said = run("list")
    assert code == 0
    assert "insightface" in said
    assert run("verify", "buffalo_sc")[0] == 0


def test_non_commercial_weights_ask_for_their_licence(model_dir: Path, server: str) -> None:
    code, said = run("pull", "buffalo_sc", "--mirror", server)
    assert code == 3
    assert "--accept-licence" in said
    assert "non-commercial" in said
    assert not model_dir.exists()


def test_an_archive_that_is_not_the_published_one_leaves_nothing(model_dir: Path, server: str, published: Path) -> None:
    with zipfile.ZipFile(published / "buffalo_sc.zip", "a") as archive:
        archive.writestr("more.txt", "changed")
    code, said = run("pull", "buffalo_sc", "--accept-licence", "--mirror", server)
    assert code == 1
    assert "expected SHA-256" in said
    assert hashlib.sha256((published / "buffalo_sc.zip").read_bytes()).hexdigest() in said
    assert list(model_dir.iterdir()) == []


def test_an_archive_without_the_files_leaves_nothing(
    model_dir: Path, server: str, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(published / "buffalo_sc.zip", "w") as archive:
        archive.writestr("readme.txt", "no models")
    publish(published / "buffalo_sc.zip", monkeypatch)
    code, said = run("pull", "buffalo_sc", "--accept-licence", "--mirror", server)
    assert code == 1
    assert "does not hold det_500m.onnx" in said
    assert list(model_dir.iterdir()) == []


def test_a_closed_network_is_told_with_the_address_and_the_folder(model_dir: Path) -> None:
    code, said = run("pull", "opencv_zoo", "--mirror", "http://127.0.0.1:9/zoo")
    assert code == 1
    assert "http://127.0.0.1:9/zoo/face_detection_yunet/face_detection_yunet_2023mar.onnx" in said
    assert str(model_dir / "opencv_zoo") in said
    assert "FACE_MODEL=dlib needs no download" in said
    assert list(model_dir.iterdir()) == []


def test_a_server_that_has_no_such_file_is_told(model_dir: Path, server: str) -> None:
    code, said = run("pull", "antelopev2", "--accept-licence", "--mirror", server)
    assert code == 1
    assert "the server answered 404" in said
    assert not (model_dir / "antelopev2").exists()


def test_what_is_there_already_is_not_replaced(model_dir: Path, server: str) -> None:
    (model_dir / "buffalo_sc").mkdir(parents=True)
    code, said = run("pull", "buffalo_sc", "--accept-licence", "--mirror", server)
    assert code == 1
    assert "is there already" in said


def test_an_unknown_pack_is_refused_naming_those_that_exist() -> None:
    code, said = run("pull", "buffalo_xxl")
    assert code == 2
    assert "buffalo_l" in said


def test_verify_finds_a_changed_file(model_dir: Path, server: str) -> None:
    run("pull", "buffalo_sc", "--accept-licence", "--mirror", server)
    with (model_dir / "buffalo_sc" / "w600k_mbf.onnx").open("ab") as file:
        file.write(b"\0\0")
    code, said = run("verify")
    assert code == 1
    assert "w600k_mbf.onnx is not the file that was meant" in said


def test_verify_of_the_built_in_pack_passes(model_dir: Path) -> None:
    code, said = run("verify", "dlib")
    assert code == 0
    assert str(model_dir) not in said
    assert "as pinned" in said
    assert run("verify", "nothing")[0] == 2
