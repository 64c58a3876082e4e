"""`idem models`: which packs of weights are here, fetching more, and checking them."""

import os
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from app.cli.re_embed import re_embed
from app.cli.settings import read_settings
from app.engine.packs import MANIFEST, OFFICIAL_DIGESTS, FoundPack, discover, sha256_of
from app.errors import ModelUnavailable

app = typer.Typer(
    help="Packs of face model weights: list, pull, verify; and moving galleries to another one.", no_args_is_help=True
)
app.command("re-embed")(re_embed)

INSIGHTFACE_RELEASE = "https://github.com/deepinsight/insightface/releases/download/v0.7"
OPENCV_ZOO = "https://github.com/opencv/opencv_zoo/raw/main/models"
NON_COMMERCIAL = (
    "non-commercial research only (InsightFace); commercial use needs a licence from https://www.insightface.ai"
)

#: The largest pack has 361 MB.
MOST_BYTES = 600_000_000
_CONNECT_SECONDS, _READ_SECONDS = 10.0, 60.0
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class Download:
    """A file to fetch: where it comes from, under which name it is kept, and the digest that its publisher names."""

    path: str
    file: str
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Source:
    """A pack that can be pulled; `keep` names the files that are taken out of a zip."""

    base: str
    downloads: tuple[Download, ...]
    keep: tuple[str, ...]
    licence: str
    commercial_use: bool
    manifest: str | None = None


def _insightface(name: str, sha256: str, *keep: str) -> Source:
    archive = Download(f"{name}.zip", f"{name}.zip", sha256)
    return Source(INSIGHTFACE_RELEASE, (archive,), keep, NON_COMMERCIAL, commercial_use=False)


_OPENCV_MANIFEST = f"""\
# YuNet and SFace of OpenCV Zoo.
kind = "opencv"
licence = "MIT (YuNet), Apache-2.0 (SFace)"
commercial_use = true

[detector]
kind = "yunet"
file = "face_detection_yunet_2023mar.onnx"
sha256 = "{(_YUNET := "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4")}"

[recogniser]
file = "face_recognition_sface_2021dec.onnx"
sha256 = "{(_SFACE := "0ba9fbfa01b5270c96627c4ef784da859931e02f04419c829e83484087c34e79")}"
dimension = 128
mean = [0, 0, 0]
scale = [1, 1, 1]
"""

#: Digests of the archives: InsightFace's own package list (server/backend/insightface_server/models/packages.py); that of
#: buffalo_s is not in it and is the one that several projects which fetch it quote. Of OpenCV Zoo's files: its LFS pointers.
SOURCES = {
    "buffalo_sc": _insightface(
        "buffalo_sc",
        "57d31b56b6ffa911c8a73cfc1707c73cab76efe7f13b675a05223bf42de47c72",
        "det_500m.onnx",
        "w600k_mbf.onnx",
    ),
    "buffalo_s": _insightface(
        "buffalo_s",
        "d85a87f503f691807cd8bb97128bdf7a0660326cd9cd02657127fa978bab8b5e",
        "det_500m.onnx",
        "w600k_mbf.onnx",
    ),
    "buffalo_l": _insightface(
        "buffalo_l",
        "80ffe37d8a5940d59a7384c201a2a38d4741f2f3c51eef46ebb28218a7b0ca2f",
        "det_10g.onnx",
        "w600k_r50.onnx",
    ),
    "antelopev2": _insightface(
        "antelopev2",
        "8e182f14fc6e80b3bfa375b33eb6cff7ee05d8ef7633e738d1c89021dcf0c5c5",
        "scrfd_10g_bnkps.onnx",
        "glintr100.onnx",
    ),
    "opencv_zoo": Source(
        OPENCV_ZOO,
        (
            Download(
                "face_detection_yunet/face_detection_yunet_2023mar.onnx", "face_detection_yunet_2023mar.onnx", _YUNET
            ),
            Download(
                "face_recognition_sface/face_recognition_sface_2021dec.onnx",
                "face_recognition_sface_2021dec.onnx",
                _SFACE,
            ),
        ),
        (),
        "MIT (YuNet), Apache-2.0 (SFace)",
        commercial_use=True,
        manifest=_OPENCV_MANIFEST,
    ),
}

_errors = Console(stderr=True, soft_wrap=True)
_output = Console(soft_wrap=True)


class PullFailed(Exception):
    """Why a pack was not installed; nothing of it is left."""


@app.command("list")
def list_packs() -> None:
    """Show the packs that are here, whether they can be used, and those that can be pulled."""
    settings = read_settings()
    found = discover(settings.model_dir)
    table = Table("pack", "kind", "use", "licence", "contract or reason", title=f"Packs in {settings.model_dir}")
    for entry in found:
        if entry.pack is None:
            table.add_row(entry.name, "-", "not usable", "-", entry.reason)
        else:
            card = entry.pack.card
            use = "commercial use allowed" if card.commercial_use else "no commercial use"
            table.add_row(entry.name, entry.pack.kind, use, card.licence, card.contract[:19] + "…")
    _output.print(table)
    present = {entry.name for entry in found if entry.is_usable}
    missing = [name for name in SOURCES if name not in present]
    if missing:
        _output.print(f"Can be pulled: {', '.join(missing)} (idem models pull NAME)")


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(SOURCES)}.")],
    *,
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="You have read the terms of the weights, and keep to them.")
    ] = False,
    mirror: Annotated[
        str | None, typer.Option(help="Fetch from this address, with the same file names, instead of the publisher's.")
    ] = None,
) -> None:
    """Fetch a pack into MODEL_DIR: with a progress bar, checked by SHA-256, all of it or nothing."""
    source = SOURCES.get(name)
    if source is None:
        _errors.print(f"There is no pack {name!r} to pull; there are {', '.join(SOURCES)}.")
        raise typer.Exit(2)
    if not source.commercial_use and not accept_licence:
        _errors.print(f"The weights of {name} are for {source.licence}.")
        _errors.print("Pull them with --accept-licence when you have read the terms and keep to them.")
        raise typer.Exit(3)
    model_dir = read_settings().model_dir
    try:
        install(name, source, model_dir, mirror=mirror)
    except PullFailed as failure:
        _errors.print(f"{name} was not installed: {failure}")
        raise typer.Exit(1) from None
    _output.print(f"{name} is installed in {model_dir / name}. Use it with FACE_MODEL={name}.")


@app.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="A pack; all of them when none is named.")] = None,
) -> None:
    """Check the files of the packs against the SHA-256 that their manifest or publisher names; fails when one differs."""
    settings = read_settings()
    found = [entry for entry in discover(settings.model_dir) if name in (None, entry.name)]
    if not found:
        _errors.print(f"There is no pack {name!r} in {settings.model_dir}.")
        raise typer.Exit(2)
    # Every pack is looked at. A folder that is no pack is a fault only when it was named, or holds another's bytes.
    faults = [entry for entry in found if not _is_sound(entry)]
    if any(name is not None or entry.is_usable or "SHA-256" in entry.reason for entry in faults):
        raise typer.Exit(1)


def install(name: str, source: Source, model_dir: Path, *, mirror: str | None = None) -> None:
    """Fetch, check and unpack into `model_dir/name`, by one rename at the end. Raises PullFailed."""
    target = model_dir / name
    if target.exists():
        message = f"{target} is there already; remove it first, or check it with `idem models verify {name}`"
        raise PullFailed(message)
    try:
        model_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=model_dir) as scratch:
            fetched, ready = Path(scratch) / "fetched", Path(scratch) / "ready"
            fetched.mkdir()
            ready.mkdir()
            for download in source.downloads:
                _fetch(download, mirror or source.base, fetched / download.file, target)
            if source.keep:
                _unpack(fetched / source.downloads[0].file, source.keep, ready)
            else:
                for download in source.downloads:
                    (fetched / download.file).rename(ready / download.file)
            if source.manifest is not None:
                (ready / MANIFEST).write_text(source.manifest, encoding="utf-8")
            ready.rename(target)
    except OSError as error:
        message = f"{model_dir} cannot be written: {error.strerror or error}"
        raise PullFailed(message) from error


def _fetch(download: Download, base: str, file: Path, target: Path) -> None:
    url = f"{base.rstrip('/')}/{download.path}"
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    timeout = httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS)
    try:
        with (
            Progress(*columns, console=_errors) as progress,
            httpx.stream("GET", url, follow_redirects=True, timeout=timeout) as response,
            file.open("wb") as output,
        ):
            response.raise_for_status()
            length = response.headers.get("Content-Length", "")
            task = progress.add_task(download.file, total=int(length) if length.isdigit() else None)
            for chunk in response.iter_bytes(_CHUNK):
                output.write(chunk)
                progress.advance(task, len(chunk))
                if output.tell() > MOST_BYTES:
                    message = f"{url} is larger than {MOST_BYTES // 1_000_000} MB"
                    raise PullFailed(message)
            output.flush()
            os.fsync(output.fileno())
    except httpx.HTTPStatusError as error:
        raise PullFailed(
            _by_hand(url, f"the server answered {error.response.status_code}", download, target)
        ) from error
    except httpx.HTTPError as error:
        raise PullFailed(_by_hand(url, f"it cannot be reached ({type(error).__name__})", download, target)) from error
    found = sha256_of(file)
    if download.sha256 is None:
        _errors.print(f"{download.file}: no published digest is known; found SHA-256 {found}")
    elif found != download.sha256:
        message = f"{download.file} is not what was published: expected SHA-256 {download.sha256}, found {found}"
        raise PullFailed(message)


def _by_hand(url: str, reason: str, download: Download, target: Path) -> str:
    what = "unpack its .onnx files" if download.file.endswith(".zip") else "put it, with the pack's other files,"
    digest = f" (SHA-256 {download.sha256})" if download.sha256 else ""
    return (
        f"{url}: {reason}. Where this network is closed: fetch that address{digest} on another machine, and {what} into "
        f"{target}; or name a mirror with --mirror. FACE_MODEL=dlib needs no download."
    )


def _unpack(archive: Path, keep: tuple[str, ...], ready: Path) -> None:
    """The named files, wherever in the archive they lie; no path of the archive is followed."""
    try:
        with zipfile.ZipFile(archive) as content:
            for name in keep:
                members = [entry for entry in content.infolist() if PurePosixPath(entry.filename).name == name]
                if len(members) != 1 or members[0].file_size > MOST_BYTES:
                    message = f"{archive.name} does not hold {name} as one file of a sensible size"
                    raise PullFailed(message)
                with content.open(members[0]) as packed, (ready / name).open("wb") as output:
                    shutil.copyfileobj(packed, output, _CHUNK)
                found, expected = sha256_of(ready / name), OFFICIAL_DIGESTS[name]
                if found != expected:
                    message = f"{name} is not what was published: expected SHA-256 {expected}, found {found}"
                    raise PullFailed(message)
    except zipfile.BadZipFile as error:
        message = f"{archive.name} is not a zip archive"
        raise PullFailed(message) from error


def _is_sound(entry: FoundPack) -> bool:
    if entry.pack is None:
        _errors.print(f"{entry.name}: not usable: {entry.reason}")
        return False
    for weights in (entry.pack.detector, entry.pack.recogniser):
        try:
            weights.read()
        except ModelUnavailable as problem:
            _errors.print(f"{entry.name}: {problem.detail}")
            return False
        named = "published" if OFFICIAL_DIGESTS.get(weights.path.name) == weights.sha256 else _named_by(entry)
        _output.print(f"{entry.name}: {weights.path.name} has SHA-256 {weights.sha256} ({named})")
    return True


def _named_by(entry: FoundPack) -> str:
    if entry.pack is not None and entry.pack.kind == "dlib":
        return "as pinned"
    has_manifest = entry.folder is not None and (entry.folder / MANIFEST).is_file()
    return "as in its manifest" if has_manifest else "found; nobody published a digest for it"
