"""Generations: a gallery's index files, published once on the share, and one verified copy of each on every host.

    <share>/<gallery id>/<epoch>-<number>/              files and MANIFEST.json: never changed, only dropped
    <share>/<gallery id>/.<epoch>-<number>.<token>.tmp/ what a publisher is writing, or what is being dropped
    <cache>/<gallery id>/<epoch>-<number>/              this host's copy: what processes map

Which generation counts is written elsewhere, with the SHA-256 of its manifest: what lies in a folder proves nothing by
itself. Nobody maps the share: a file that another host replaces or deletes under a map kills the process.
"""

import errno
import fcntl
import hashlib
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from storage.ownership import Guard, NotOurs

MANIFEST: Final = "MANIFEST.json"

#: What a long step tells as it goes on: bytes done, and bytes in all. It may raise, to stop the step.
Progress = Callable[[int, int], None]

_ID: Final = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
_NAME: Final = re.compile(rf"({_ID})-(0|[1-9][0-9]{{0,17}})")
_TEMPORARY: Final = re.compile(rf"\.({_ID})-(0|[1-9][0-9]{{0,17}})\.[0-9a-f]{{16}}\.tmp")
_GALLERY: Final = re.compile(_ID)
#: No separators, no leading dot, so that no name can lead out of its folder.
_FILE: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

#: A manifest is about 2 KB; what is longer is not read.
_MANIFEST_LIMIT: Final = 256 * 1024
#: Half a billion float16 vectors of 512 dimensions: more than a host could hold, so nothing is begun for it.
_SIZE_LIMIT: Final = 2**39
#: SHA-256 runs at 1.4 GB/s in such blocks, with a processor that knows it; larger ones gain nothing.
_BLOCK: Final = 1024 * 1024
#: How long dropping copies waits for somebody who makes one, and how often whoever waits looks.
_PATIENCE_SECONDS: Final = 1.0
_LOOK_SECONDS: Final = 0.02

_VANISHED: Final = frozenset({errno.ENOENT, errno.ESTALE})
_NOT_PLAIN: Final = frozenset({errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO})
_SPOILT: Final = frozenset({errno.EIO, errno.EACCES, errno.EPERM, errno.EBADMSG, errno.EUCLEAN})
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

Fault = Literal["missing", "foreign", "truncated", "corrupt", "unreadable"]


class BadGeneration(Exception):
    """What lies on the share is not what was published; `reason` says in one sentence what is wrong.

    fault: `missing`: it is not there, or went away while it was read (read anew which one counts before anything else); the
    rest stays wrong until it is published anew: `foreign` (another generation's files, links, unknown names),
    `truncated` (too short or too long), `corrupt` (other bytes), `unreadable` (the share does not give it, or this version
    cannot read it).
    """

    def __init__(self, fault: Fault, reason: str) -> None:
        super().__init__(fault, reason)  # both, so that it can cross a process border
        self.fault = fault
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class GenerationStoreUnavailable(OSError):
    """The share cannot be reached or written, or this host's cache is full or closed. Publishing anew would not help."""


class IndexNotOurs(NotOurs, GenerationStoreUnavailable):
    """The share or the cache belongs to another store: it can be read but not changed."""


class _Busy(Exception):
    """Another process or thread of this host has the lock."""


class GenerationExists(Exception):
    """That number was used already: a generation is never written over."""


class GenerationName(NamedTuple):
    """Which generation of a gallery; a plain tuple does as well."""

    epoch: str
    number: int


class FileEntry(BaseModel):
    """One file of a generation; `sha256` in hexadecimal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=0, le=_SIZE_LIMIT)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class MeasuredRecall(BaseModel):
    """What one scanner missed of the pairs that an exact search finds.

    lower_bound: of the recall, at 95% confidence; target: what the gallery asks of that bound.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    pairs: int = Field(ge=0)
    misses: int = Field(ge=0)
    lower_bound: float = Field(ge=0, le=1)
    target: float = Field(ge=0, le=1)


class Manifest(BaseModel):
    """What a generation holds.

    number: rises within an epoch, and none is used twice. watermark: the `seq` up to which every change is in it. margin, recall:
    by scanner. threshold: what they were measured at. built_by: versions of what wrote it. files: filled in by `commit_files`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal[1] = 1
    gallery_id: str
    epoch: str
    number: int = Field(ge=0, lt=10**18)
    contract: str
    rotation: str
    dimension: int = Field(ge=1)
    kind: Literal["exact", "faiss"]
    lists: int = Field(ge=0)
    count: int = Field(ge=0)
    watermark: int = Field(ge=0)
    threshold: float
    margin: dict[str, float]
    probes: int | None
    recall: dict[str, MeasuredRecall]
    built_at: AwareDatetime
    built_by: str
    files: dict[Annotated[str, Field(pattern=_FILE)], FileEntry] = Field(default_factory=dict, max_length=64)

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(entry.size for entry in self.files.values())


@dataclass(frozen=True, slots=True)
class DiskUse:
    """Bytes of a gallery on the share and in this host's cache, half-written and half-dropped folders included."""

    share: int
    cache: int


class GenerationStore:
    """Publishes generations to a share and opens them through a cache of this host. Blocking; safe from any process.

    The share needs neither locks nor mapping, so NFS will do. Every method raises ValueError for ids of another shape, and
    GenerationStoreUnavailable when share or cache fail.
    """

    def __init__(
        self, share: Path, cache: Path, *, share_guard: Guard | None = None, cache_guard: Guard | None = None
    ) -> None:
        """share: a folder that all hosts see; cache: a folder on a local disk, made with mode 0700.

        The guards check the owner before each change. None: no other store can be using the folder.
        """
        self._share = share.absolute()
        self._cache = cache.absolute()
        self._guards = {self._share: share_guard, self._cache: cache_guard}

    def remember(self, galleries: Collection[str]) -> None:
        """Add to the galleries that the store has or had. Folders of all other galleries are left unchanged."""
        for guard in filter(None, self._guards.values()):
            guard.owner.galleries.update(galleries)

    def strangers(self) -> list[str]:
        """Visible names in both folders that are neither present or former galleries of the store, nor its other places."""
        found: list[str] = []
        for guard in filter(None, self._guards.values()):
            try:
                found += [f"{guard.place.where}/{name}" for name in guard.place.unknown(guard.owner)]
            except FileNotFoundError:
                continue
            except OSError as problem:
                message = f"{guard.place.where} cannot be listed: {problem.strerror}"
                raise GenerationStoreUnavailable(problem.errno, message) from problem
        return found

    def stage(self, gallery_id: str, epoch: str, number: int) -> Path:
        """An empty folder for the files of a generation, on the share, to be handed to `commit_files`.

        What a killed publisher of the same generation left is removed; one that only slept finds its folder gone, and
        cannot write into this one. Raises GenerationExists: take a higher number.
        """
        name = _folder_name(epoch, number)
        gallery = self._share / _checked_gallery(gallery_id)
        with self._changing(self._share):
            gallery.mkdir(mode=0o700, parents=True, exist_ok=True)
            _sync_folder(self._share)
            if os.path.lexists(gallery / name):
                raise _exists(gallery_id, name)
            for left in _entries(gallery):
                if (found := _temporary_name(left)) and found == (epoch, number):
                    _remove_tree(gallery / left)
            staged = gallery / _temporary_folder(name)
            staged.mkdir(mode=0o700)
        return staged

    def commit_files(self, staged: Path, manifest: Manifest, progress: Progress | None = None) -> str:
        """Make a staged folder the generation that `manifest` names; returns the SHA-256 of its MANIFEST.json.

        Durable when it returns, but nobody asks for it yet: it counts from the moment when that digest is written where
        readers look. Raises GenerationExists, and ValueError when the folder holds anything but files.
        """
        name = _folder_name(manifest.epoch, manifest.number)
        gallery = self._share / _checked_gallery(manifest.gallery_id)
        if staged.parent != gallery or _temporary_name(staged.name) != (manifest.epoch, manifest.number):
            raise ValueError(f"{staged.name} was not staged for generation {name}")
        with self._changing(self._share):
            with _opened(staged) as folder:
                text = (
                    manifest.model_copy(update={"files": _settled(folder, progress)}).model_dump_json(indent=1).encode()
                )
                Manifest.model_validate_json(text)  # refused here, not by every reader
                _write_file(folder, f"{MANIFEST}.tmp", text)
                os.replace(f"{MANIFEST}.tmp", MANIFEST, src_dir_fd=folder, dst_dir_fd=folder)
                os.fsync(folder)
            digest = hashlib.sha256(text).hexdigest()
            try:
                staged.rename(gallery / name)
            except OSError as problem:
                # NFS may lose the answer to a rename that took place, and fail its own repetition.
                if not _holds_manifest(gallery / name, digest):
                    if problem.errno in {errno.EEXIST, errno.ENOTEMPTY}:
                        raise _exists(manifest.gallery_id, name) from problem
                    raise
            _sync_folder(gallery)
        return digest

    def fetch(
        self, gallery_id: str, epoch: str, number: int, digest: str, progress: Progress | None = None
    ) -> tuple[Path, Manifest]:
        """The folder of this host's copy, every byte of it verified by this call, and its manifest.

        digest: SHA-256 of the manifest of the generation that counts. One process of a host copies, the others wait; a copy that
        has gone bad is made anew. Open what you need at once: once `drop_copies` has removed it, only what is open or
        mapped remains. Raises BadGeneration.
        """
        # First without the lock: a process that hangs in the middle of copying holds up nobody who has a copy.
        if (here := self.copied(gallery_id, epoch, number, digest, progress)) is not None:
            return here
        wanted = _Wanted(_checked_gallery(gallery_id), epoch, number, digest)
        copy = self._cache / gallery_id / wanted.folder
        with self._locked(gallery_id, progress) as lock:
            told = _beating(lock, progress)
            if (manifest := _intact(copy, wanted, told)) is None:
                manifest = self._copy(copy, wanted, told)
        return copy, manifest

    def copied(
        self, gallery_id: str, epoch: str, number: int, digest: str, progress: Progress | None = None
    ) -> tuple[Path, Manifest] | None:
        """What `fetch` returns, without a look at the share: None when this host has no good copy."""
        wanted = _Wanted(_checked_gallery(gallery_id), epoch, number, digest)
        copy = self._cache / gallery_id / wanted.folder
        manifest = _intact(copy, wanted, progress)
        return None if manifest is None else (copy, manifest)

    def verify(
        self, gallery_id: str, epoch: str, number: int, digest: str, progress: Progress | None = None
    ) -> Manifest:
        """Read the original on the share through, and return its manifest. Raises BadGeneration."""
        wanted = _Wanted(_checked_gallery(gallery_id), epoch, number, digest)
        with self._original(wanted) as folder:
            return _verified(folder, wanted, progress)

    def galleries(self) -> list[str]:
        """Ids of the galleries that have a folder on the share."""
        return sorted(filter(_GALLERY.fullmatch, _entries(self._share)))

    def is_removed(self) -> bool:
        """Whether the share's folder is missing although its parent folder exists.

        This differs from a share that is not mounted: that one leaves its mount point, an empty folder.
        """
        return not self._share.exists() and self._share.parent.is_dir()

    def listed(self, gallery_id: str) -> list[GenerationName]:
        """The generations on the share, by rising number; whether they are good is not asked."""
        found = (_generation_name(entry) for entry in _entries(self._share / _checked_gallery(gallery_id)))
        return sorted((name for name in found if name is not None), key=lambda name: (name.number, name.epoch))

    def drop(self, gallery_id: str, keep: Collection[tuple[str, int]]) -> list[GenerationName]:
        """Delete from the share what can never count again; returns the generations of which something went for good.

        That is: whatever is not in `keep` and is older than the newest that is. Newer ones may be a publisher's that has not
        committed yet. What was half written goes by the same rule. A reader in the middle of a copy sees it vanish; what NFS
        does not let go while it is open is tried again by the next call.
        """
        gallery = self._share / _checked_gallery(gallery_id)
        with self._changing(self._share):
            return _drop_older(gallery, keep)

    def has_others(self, gallery_id: str, keep: Collection[tuple[str, int]]) -> bool:
        """Whether the share holds anything of the gallery but these: older ones, newer ones, half-written ones."""
        kept = {_folder_name(*name) for name in keep}
        entries = _entries(self._share / _checked_gallery(gallery_id))
        return any(entry not in kept for entry in entries if _generation_name(entry) or _temporary_name(entry))

    def drop_copies(self, gallery_id: str, keep: Collection[tuple[str, int]]) -> list[GenerationName]:
        """Delete this host's copies by the rule of `drop`; what processes have mapped stays until they let go.

        None goes while somebody else of this host copies for long: a copying that hangs must hold up nobody.
        """
        copies = self._cache / _checked_gallery(gallery_id)
        if not copies.is_dir():
            return []
        with suppress(_Busy), self._locked(gallery_id, seconds=_PATIENCE_SECONDS), _writing(self._cache):
            return _drop_older(copies, keep)
        return []

    def drop_gallery(self, gallery_id: str) -> bool:
        """Delete the generations of a gallery that was deleted, from the share and from this host's cache.

        Returns False if something remains. On NFS, files that another process has open remain: call again later. Files that
        belong to no generation stay, and so does the folder of a gallery that the store never had.
        """
        original = self._share / _checked_gallery(gallery_id)
        if not self._had(self._share, gallery_id):
            return False
        with self._changing(self._share):
            is_gone = _remove_generations(original)
        return self._drop_copies_of(gallery_id) and is_gone

    def drop_other_copies(self, galleries: Collection[str]) -> list[str]:
        """Delete this host's copies of all galleries but these. Returns the galleries whose copies were deleted.

        Folders of galleries that the store never had are left unchanged.
        """
        others = sorted(set(filter(_GALLERY.fullmatch, _entries(self._cache))) - set(galleries))
        mine = [gallery_id for gallery_id in others if self._had(self._cache, gallery_id)]
        return [gallery_id for gallery_id in mine if self._drop_copies_of(gallery_id)]

    def disk_use(self, gallery_id: str) -> DiskUse:
        """How much disk a gallery takes."""
        _checked_gallery(gallery_id)
        return DiskUse(_tree_size(self._share / gallery_id), _tree_size(self._cache / gallery_id))

    def _copy(self, copy: Path, wanted: "_Wanted", progress: Progress | None) -> Manifest:
        """Copy the original, hash what was written, and put it in the place of what was there. Under the lock."""
        for left in filter(_TEMPORARY.fullmatch, _entries(copy.parent)):  # a killed process's
            _remove_tree(copy.parent / left)
        temporary = copy.parent / _temporary_folder(wanted.folder)
        try:
            with self._original(wanted) as original:
                manifest, text = _read_manifest(original, wanted)
                _check_files(original, manifest, wanted)
                self._require_room(manifest.size + len(text))
                meter = _Meter(progress, 2 * manifest.size)
                with _writing(self._cache):
                    copy.parent.mkdir(mode=0o700, exist_ok=True)
                    temporary.mkdir(mode=0o700)
                for file, entry in manifest.files.items():
                    self._copy_file(_blocks(original, file, entry.size, wanted), temporary / file, meter)
            with _writing(self._cache), _opened(temporary) as folder:
                _write_file(folder, MANIFEST, text)
                self._read_back(folder, manifest, wanted, meter)
            with _writing(self._cache):
                _remove_tree(copy)
                temporary.rename(copy)
        finally:
            with suppress(OSError):
                _remove_tree(temporary)
        return manifest

    def _copy_file(self, blocks: Iterator[memoryview], target: Path, meter: "_Meter") -> None:
        with _writing(self._cache):
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o400)
        try:
            for block in blocks:
                with _writing(self._cache):
                    written = 0
                    while written < len(block):
                        written += os.write(descriptor, block[written:])
                meter.add(len(block))
        finally:
            os.close(descriptor)

    def _read_back(self, folder: int, manifest: Manifest, wanted: "_Wanted", meter: "_Meter") -> None:
        try:
            _check_hashes(folder, manifest, wanted, meter)
        except BadGeneration as problem:
            # Whose fault is it? The original's is told from here.
            self.verify(wanted.gallery_id, wanted.epoch, wanted.number, wanted.digest)
            message = f"{wanted}: the copy reads back otherwise than it was written; is this host's disk failing?"
            raise GenerationStoreUnavailable(errno.EIO, message) from problem

    def _require_room(self, size: int) -> None:
        with _writing(self._cache):
            free = shutil.disk_usage(self._cache).free
        if free < size:
            message = f"the copy needs {size / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free in {self._cache}"
            raise GenerationStoreUnavailable(errno.ENOSPC, message)

    @contextmanager
    def _original(self, wanted: "_Wanted") -> Iterator[int]:
        if not self._share.is_dir():
            raise GenerationStoreUnavailable(
                errno.ENOENT, f"the shared folder {self._share} is not there; is it mounted?"
            )
        with ExitStack() as opened:
            # Folder by folder: to open one makes NFS ask the server for its entries, so that a new name is soon seen.
            with wanted.reading("its gallery's folder"):
                gallery = opened.enter_context(_opened(self._share / wanted.gallery_id))
            with wanted.reading("its folder"):
                folder = opened.enter_context(_opened(wanted.folder, inside=gallery))
            yield folder

    def _drop_copies_of(self, gallery_id: str) -> bool:
        if not os.path.lexists(self._cache / gallery_id):
            return True
        with suppress(_Busy), self._locked(gallery_id, seconds=_PATIENCE_SECONDS), _writing(self._cache):
            return _remove_generations(self._cache / gallery_id)
        return False

    def _had(self, root: Path, gallery_id: str) -> bool:
        """Whether the store has or had the gallery, as far as this process knows."""
        guard = self._guards[root]
        return guard is None or gallery_id in guard.owner.galleries

    @contextmanager
    def _changing(self, root: Path) -> Iterator[None]:
        """Run the body, which changes something below `root`, if this store owns it. Raises IndexNotOurs."""
        guard = self._guards[root]
        with _writing(root):
            if guard is not None:
                try:
                    guard.require()
                except NotOurs as problem:
                    raise IndexNotOurs(problem.errno, problem.strerror) from problem
            yield

    @contextmanager
    def _locked(self, gallery_id: str, waiting: Progress | None = None, *, seconds: float = math.inf) -> Iterator[int]:
        """One process of this host, and one thread of it, at a time. The kernel lets go when a process dies.

        waiting: told when whoever has the lock gets on, see `_beating`. Raises _Busy when he has it for so many seconds more.
        """
        with self._changing(self._cache):
            self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._cache.stat().st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "the cache belongs to another user", str(self._cache))
            self._cache.chmod(0o700)
            # The file stays, empty: if it were removed, two could hold the lock, each on a file of its own.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            lock = os.open(self._cache / f".{gallery_id}.lock", flags, 0o600)
        try:
            _take(lock, waiting, seconds)
            yield lock
        finally:
            os.close(lock)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The generation that somebody asks for."""

    gallery_id: str
    epoch: str
    number: int
    digest: str

    def __str__(self) -> str:
        return f"generation {self.folder} of gallery {self.gallery_id}"

    @property
    def folder(self) -> str:
        return _folder_name(self.epoch, self.number)

    def bad(self, fault: Fault, what: str) -> BadGeneration:
        return BadGeneration(fault, f"{self}: {what}")

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Tell what a failure to read it means."""
        try:
            yield
        except GenerationStoreUnavailable:
            raise
        except OSError as problem:
            if problem.errno in _VANISHED:
                raise self.bad("missing", f"{what} is not there") from problem
            if problem.errno in _NOT_PLAIN:
                raise self.bad("foreign", f"{what} is a link, or no plain file or folder") from problem
            told = f"{what} cannot be read: {problem.strerror}"
            if problem.errno in _SPOILT:
                raise self.bad("unreadable", told) from problem
            raise GenerationStoreUnavailable(problem.errno, f"{self}: {told}") from problem


class _Meter:
    """Counts bytes, and tells."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._done, self._total = 0, total

    def add(self, size: int) -> None:
        self._done += size
        if self._progress is not None:
            self._progress(self._done, self._total)


def _take(lock: int, waiting: Progress | None, seconds: float) -> None:
    """Wait for the lock. Raises _Busy."""
    until, beat = time.monotonic() + seconds, os.fstat(lock).st_mtime_ns
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            if time.monotonic() >= until:
                raise _Busy from problem
        else:
            return
        before, beat = beat, os.fstat(lock).st_mtime_ns
        if waiting is not None and beat != before:
            waiting(0, 1)
        time.sleep(_LOOK_SECONDS)


def _beating(lock: int, progress: Progress | None) -> Progress:
    """Progress that whoever waits for the lock sees too, by the time of its file."""

    def told(done: int, total: int) -> None:
        os.utime(lock)
        if progress is not None:
            progress(done, total)

    return told


def _intact(copy: Path, wanted: _Wanted, progress: Progress | None) -> Manifest | None:
    """The manifest of a copy that is as it was published, else None: what is wrong with it is not worth a word."""
    try:
        with _opened(copy) as folder:
            return _verified(folder, wanted, progress)
    except (BadGeneration, OSError):
        return None


def _verified(folder: int, wanted: _Wanted, progress: Progress | None) -> Manifest:
    """The manifest of an open folder, every byte of whose files was read. Raises BadGeneration."""
    manifest, _ = _read_manifest(folder, wanted)
    _check_files(folder, manifest, wanted)
    _check_hashes(folder, manifest, wanted, _Meter(progress, manifest.size))
    return manifest


def _read_manifest(folder: int, wanted: _Wanted) -> tuple[Manifest, bytes]:
    with wanted.reading(MANIFEST), _opened_file(folder, MANIFEST) as descriptor:
        if _plain_size(descriptor, MANIFEST, wanted) > _MANIFEST_LIMIT:
            raise wanted.bad("truncated", f"{MANIFEST} is longer than {_MANIFEST_LIMIT:,} bytes")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            text = file.read(_MANIFEST_LIMIT)
    is_published = hashlib.sha256(text).hexdigest() == wanted.digest
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as problem:
        if is_published:
            # Another version's publisher is right, and so is what it wrote: building it anew would not help.
            raise wanted.bad("unreadable", f"{MANIFEST} has a form that this version does not know") from problem
        raise wanted.bad("corrupt", f"{MANIFEST} is not the one that was published, nor one at all") from problem
    if (manifest.gallery_id, manifest.epoch, manifest.number) != (wanted.gallery_id, wanted.epoch, wanted.number):
        other = f"generation {manifest.epoch}-{manifest.number} of gallery {manifest.gallery_id}"
        raise wanted.bad("foreign", f"{MANIFEST} is that of {other}")
    if not is_published:
        raise wanted.bad("corrupt", f"{MANIFEST} is not the one that was published")
    return manifest, text


def _check_files(folder: int, manifest: Manifest, wanted: _Wanted) -> None:
    """Names and sizes, before anything large is read."""
    with wanted.reading("its folder"):
        there = set(os.listdir(folder))
    expected = manifest.files.keys() | {MANIFEST}
    if unknown := sorted(there - expected):
        raise wanted.bad("foreign", f"{unknown[0]!a} is no file of it")
    if absent := sorted(expected - there):
        raise wanted.bad("missing", f"{absent[0]} is not there")
    for file, entry in manifest.files.items():
        with wanted.reading(file), _opened_file(folder, file) as descriptor:
            size = _plain_size(descriptor, file, wanted)
        if size != entry.size:
            raise wanted.bad("truncated", f"{file} is {size:,} bytes long and was published with {entry.size:,}")


def _check_hashes(folder: int, manifest: Manifest, wanted: _Wanted, meter: _Meter) -> None:
    for file, entry in manifest.files.items():
        digest = hashlib.sha256()
        for block in _blocks(folder, file, entry.size, wanted):
            digest.update(block)
            meter.add(len(block))
        if digest.hexdigest() != entry.sha256:
            raise wanted.bad("corrupt", f"{file} holds other bytes than were published")


def _blocks(folder: int, file: str, size: int, wanted: _Wanted) -> Iterator[memoryview]:
    """The `size` bytes of a file, no more and no fewer. Each block is valid until the next one is asked for."""
    buffer = memoryview(bytearray(_BLOCK))
    with wanted.reading(file), _opened_file(folder, file) as descriptor:
        left = size
        while left:
            got = os.readv(descriptor, [buffer[:left]])
            if not got:
                raise wanted.bad("truncated", f"{file} ends {left:,} bytes too early")
            left -= got
            yield buffer[:got]
        if os.read(descriptor, 1):
            raise wanted.bad("truncated", f"{file} is longer than it was published")


def _settled(folder: int, progress: Progress | None) -> dict[str, FileEntry]:
    """Make every file of a staged folder durable and read-only; their sizes and hashes."""
    files = {}
    names = sorted(os.listdir(folder))
    sizes = {file: os.stat(file, dir_fd=folder, follow_symlinks=False) for file in names}
    for file, found in sizes.items():
        if not stat.S_ISREG(found.st_mode) or file == MANIFEST or not re.fullmatch(_FILE, file):
            raise ValueError(f"{file!a} cannot be a file of a generation")
    meter = _Meter(progress, sum(found.st_size for found in sizes.values()))
    buffer = memoryview(bytearray(_BLOCK))
    for file in names:
        with _opened_file(folder, file) as descriptor:
            os.fchmod(descriptor, 0o400)
            os.fsync(descriptor)
            digest, size = hashlib.sha256(), 0
            while got := os.readv(descriptor, [buffer]):
                digest.update(buffer[:got])
                size += got
                meter.add(got)
            files[file] = FileEntry(size=size, sha256=digest.hexdigest())
    return files


def _drop_older(gallery: Path, keep: Collection[tuple[str, int]]) -> list[GenerationName]:
    """Delete what is older than the newest of `keep`: by number, and in other epochs also by the folder's time.

    Numbers are fences of one lease, so they rise from epoch to epoch. After a restore into another database they may start
    again: then the time counts. The machine that holds the files sets both times.
    """
    newest = {epoch: max(number for kept, number in keep if kept == epoch) for epoch, _ in keep}
    times = [time for name in keep if (time := _modified(gallery / _folder_name(*name))) is not None]
    dropped = []
    for entry in _entries(gallery):
        is_temporary = (name := _temporary_name(entry)) is not None
        name = name or _generation_name(entry)
        if name is None or (tuple(name) in keep and not is_temporary):
            continue
        if name.epoch in newest:
            is_older = name.number < newest[name.epoch] or tuple(name) in keep
        else:
            time = _modified(gallery / entry)
            is_older = any(name.number < number for number in newest.values()) or (
                time is not None and any(time < kept for kept in times)
            )
        if is_older and _remove_generation(gallery / entry):
            dropped.append(name)
    return sorted(dropped, key=lambda name: (name.number, name.epoch))


def _remove_generation(folder: Path) -> bool:
    """Delete a folder that leaves its place in one step; False when something remains, to be found the next time."""
    doomed = folder
    if _temporary_name(folder.name) is None:
        doomed = folder.with_name(_temporary_folder(folder.name))
        try:
            folder.rename(doomed)
        except FileNotFoundError:  # another was quicker
            return False
    return _remove_tree(doomed)


def _remove_generations(gallery: Path, epoch: str | None = None) -> bool:
    """Delete every generation in a gallery's folder, and the folder if it is then empty. Returns False if it remains.

    epoch: delete only generations of this epoch.
    """
    if gallery.is_symlink():
        return False
    for entry in _entries(gallery):
        named = _generation_name(entry) or _temporary_name(entry)
        if named and epoch in {None, named[0]}:
            _remove_generation(gallery / entry)
    with suppress(OSError):  # it is not empty
        gallery.rmdir()
    return not os.path.lexists(gallery)


def drop_generations_below(cache: Path, epochs: Mapping[str, str]) -> None:
    """Delete copies in a cache that is no longer used. epochs: by gallery; copies of other epochs and galleries stay."""
    for gallery_id, epoch in epochs.items():
        with suppress(OSError):
            _remove_generations(cache / _checked_gallery(gallery_id), epoch)


def _remove_tree(folder: Path) -> bool:
    """Delete a folder, or a link in its place, whatever is in it; False when something remains."""
    try:
        if stat.S_ISDIR(folder.lstat().st_mode):
            # Not found: another was quicker. Not empty: NFS keeps a deleted file under another name while it is open.
            shutil.rmtree(folder, ignore_errors=True)
        else:
            folder.unlink()
    except FileNotFoundError:
        return True
    return not os.path.lexists(folder)


def _tree_size(folder: Path) -> int:
    size = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            with suppress(FileNotFoundError):
                size += (Path(parent) / file).lstat().st_size
    return size


def _entries(folder: Path) -> Sequence[str]:
    """Names in a folder; none when it is not there."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as problem:
        raise GenerationStoreUnavailable(problem.errno, f"{folder} cannot be listed: {problem.strerror}") from problem


def _modified(folder: Path) -> float | None:
    try:
        return folder.lstat().st_mtime
    except FileNotFoundError:
        return None


def _holds_manifest(folder: Path, digest: str) -> bool:
    try:
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest() == digest
    except OSError:
        return False


def _write_file(folder: int, file: str, data: bytes) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o400, dir_fd=folder)
    with os.fdopen(descriptor, "wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(descriptor)


@contextmanager
def _opened(folder: Path | str, inside: int | None = None) -> Iterator[int]:
    """An open folder, which stays the same one if its name goes to another."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=inside)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _opened_file(folder: int, file: str) -> Iterator[int]:
    """An open file of an open folder; never a link, and never waiting for the other end of a pipe."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _plain_size(descriptor: int, file: str, wanted: _Wanted) -> int:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise wanted.bad("foreign", f"{file} is no plain file")
    return found.st_size


def _sync_folder(folder: Path) -> None:
    with _opened(folder) as descriptor:
        os.fsync(descriptor)


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Tell what a failure to write below `root` means."""
    try:
        yield
    except GenerationStoreUnavailable:
        raise
    except OSError as problem:
        what = "is full" if problem.errno in _FULL else f"cannot be written: {problem.strerror}"
        raise GenerationStoreUnavailable(problem.errno, f"{root} {what}") from problem


def _exists(gallery_id: str, name: str) -> GenerationExists:
    return GenerationExists(f"gallery {gallery_id} has a generation {name} already")


def _checked_gallery(gallery_id: str) -> str:
    if not _GALLERY.fullmatch(gallery_id):
        raise ValueError(f"{gallery_id!r} cannot be the id of a gallery")
    return gallery_id


def _folder_name(epoch: str, number: int) -> str:
    name = f"{epoch}-{number}"
    if _generation_name(name) != (epoch, number):
        raise ValueError(f"{name!r} cannot be the name of a generation")
    return name


def _temporary_folder(name: str) -> str:
    return f".{name}.{secrets.token_hex(8)}.tmp"


def is_generation(path: str) -> bool:
    """Whether a path within a gallery's folder names a file of a generation."""
    folder, _, file = path.partition("/")
    return bool(file) and (_generation_name(folder) or _temporary_name(folder)) is not None


def _generation_name(folder: str) -> GenerationName | None:
    found = _NAME.fullmatch(folder)
    return None if found is None else GenerationName(found[1], int(found[2]))


def _temporary_name(folder: str) -> GenerationName | None:
    found = _TEMPORARY.fullmatch(folder)
    return None if found is None else GenerationName(found[1], int(found[2]))
