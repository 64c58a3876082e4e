"""An append-only place outside the database: what is kept here can be added to, and never changed.

It holds what must still speak when the database itself was changed or set back: signed tree heads, the ledger of erasures. Names
look like `heads/2026-11-21/000000000042-key.json`.
"""

import asyncio
import base64
import fcntl
import hashlib
import io
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Final, Protocol, TypeVar
from xml.etree.ElementTree import ParseError

import urllib3
from minio import Minio
from minio.commonconfig import COMPLIANCE
from minio.datatypes import Object
from minio.error import MinioException, S3Error
from minio.retention import Retention
from urllib3.exceptions import HTTPError

from storage.ownership import ensure_bucket

#: One to eight segments; none begins with a dot, so `..` cannot be named.
_SEGMENT: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_NAME: Final = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT}){{0,7}}")
_PREFIX: Final = re.compile(rf"(?:{_SEGMENT}/){{0,7}}(?:{_SEGMENT})?")

#: Of one step. Nobody waits for evidence but background work, and it comes again.
_DEADLINE_SECONDS: Final = 10.0
#: Names of one step of a listing: a page of a bucket. Years of evidence take long to list, and each step has its own deadline.
LISTED_AT_ONCE: Final = 1000
_NO_LOCK: Final = frozenset({"ObjectLockConfigurationNotFoundError", "NotImplemented", "MethodNotAllowed"})

_Result = TypeVar("_Result")


class EvidenceUnavailable(OSError):
    """The place cannot be reached, is too slow, full, or broken."""


class EvidenceExists(Exception):
    """Other bytes lie under that name already."""


class EvidenceNotFound(LookupError):
    """Nothing lies under that name."""


class EvidenceStore(Protocol):
    """Bytes under names, written once.

    Every method raises ValueError for a name of another shape, EvidenceUnavailable on a fault.
    """

    async def append(self, name: str, data: bytes) -> None:
        """Keep `data` (not empty) under `name`; durable when it returns.

        The same bytes again are fine: after EvidenceUnavailable, ask again. Raises EvidenceExists when other bytes lie there.
        """

    async def read(self, name: str) -> bytes:
        """What was first kept under `name`. Raises EvidenceNotFound."""

    async def names(self, prefix: str = "") -> list[str]:
        """Every name that starts with `prefix`, sorted. However many there are: the deadline is each step's."""

    async def entries(self, folder: str = "") -> list[str]:
        """What lies right below `folder` (which ends in a slash): ends of names, and `segment/` for more below it; sorted."""

    async def close(self) -> None:
        """Let go of threads and connections; calls still queued are cancelled."""


class FolderEvidence:
    """Files below a folder (0700; files 0600), best on another disk than the database's.

    It outlives the database and what a backup sets back, and gives nothing more: this service's user can change all of it, and no
    attribute helps (of `chattr +a` the folders of days inherit nothing). Against that user: a bucket with object lock, or
    another host that comes and takes copies.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._thread = _Thread("evidence-files")

    async def append(self, name: str, data: bytes) -> None:
        """See EvidenceStore. What a crash left half written is completed when the same bytes come again."""
        path = self._root / _checked(name, data)
        await self._thread.run(lambda: self._append(path, data))

    async def read(self, name: str) -> bytes:
        """See EvidenceStore."""
        path = self._root / _checked(name)
        return await self._thread.run(lambda: self._read(path))

    async def names(self, prefix: str = "") -> list[str]:
        """See EvidenceStore."""
        _checked_prefix(prefix)
        found: list[str] = []
        folders = [prefix.rpartition("/")[0]]
        while folders:
            async for name, is_folder in self._listed(folders.pop()):
                if name.startswith(prefix):
                    (folders if is_folder else found).append(name)
        return await self._thread.run(lambda: sorted(found))

    async def entries(self, folder: str = "") -> list[str]:
        """See EvidenceStore."""
        _checked_folder(folder)
        found = [name.removeprefix(folder) + "/" * is_folder async for name, is_folder in self._listed(folder[:-1])]
        return sorted(found)

    async def close(self) -> None:
        """See EvidenceStore."""
        self._thread.close()

    def _append(self, path: Path, data: bytes) -> None:
        try:
            self._make_folders(path.parent)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                # Two processes may bring the same evidence at once; who comes second finds all of it, or a torn beginning.
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                kept = os.pread(descriptor, len(data) + 1, 0)
                if not data.startswith(kept):
                    message = f"other bytes are kept under {path.relative_to(self._root).as_posix()}"
                    raise EvidenceExists(message)
                while len(kept) < len(data):
                    kept = data[: len(kept) + os.pwrite(descriptor, data[len(kept) :], len(kept))]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self._sync_folders(path.parent)
        except OSError as problem:
            raise _unavailable(problem) from problem

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as problem:
            raise EvidenceNotFound(path.relative_to(self._root).as_posix()) from problem
        except OSError as problem:
            raise _unavailable(problem) from problem

    async def _listed(self, folder: str) -> AsyncIterator[tuple[str, bool]]:
        """What lies right below, with whether it is a folder."""
        listing = self._scanned(folder)
        while some := await self._thread.run(lambda: list(islice(listing, LISTED_AT_ONCE))):
            for one in some:
                yield one

    def _scanned(self, folder: str) -> Iterator[tuple[str, bool]]:
        try:
            with os.scandir(self._root / folder) as entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    # Links to folders are not followed: they could lead around in a circle.
                    is_folder = entry.is_dir(follow_symlinks=False)
                    if (is_folder or entry.is_file()) and _NAME.fullmatch(name):
                        yield name, is_folder
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as problem:
            raise _unavailable(problem) from problem

    def _make_folders(self, folder: Path) -> None:
        for wanted in [*reversed(folder.parents), folder]:
            if not wanted.is_dir():
                wanted.mkdir(mode=0o700, exist_ok=True)

    def _sync_folders(self, folder: Path) -> None:
        """Make the entries of `folder` and of those above it durable: one of them may just have been made."""
        while True:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if folder == self._root:
                return
            folder = folder.parent


class BucketEvidence:
    """Objects of a bucket on a MinIO-compatible server. The bucket is made with object lock when it is missing.

    A lock keeps versions, not names: what counts is the first version of each, whatever was written or marked deleted over it.
    """

    def __init__(  # noqa: PLR0913 - a client is opened by that many settings
        self,
        *,
        endpoint: str,
        access_key: str,
        secret_key: str,
        bucket: str,
        region: str,
        secure: bool,
        retention_days: int,
        needs_lock: bool = False,
        timeout_seconds: float = 5.0,
    ) -> None:
        """retention_days: how long the server refuses to delete a version, where the bucket has object lock; 0: no period.

        needs_lock: keep nothing in a bucket without it, whose objects anybody with the same credentials may replace.
        """
        self._bucket = bucket
        self._retention = timedelta(days=retention_days)
        self._needs_lock = needs_lock
        self._connections = urllib3.PoolManager(
            maxsize=1,
            timeout=urllib3.Timeout(connect=timeout_seconds, read=timeout_seconds),
            retries=urllib3.Retry(total=1, connect=0, read=0, backoff_factor=0),
        )
        self._client = Minio(
            endpoint,
            access_key=access_key,
            secret_key=secret_key,
            region=region,
            secure=secure,
            http_client=self._connections,
        )
        self._thread = _Thread("evidence-objects")
        self._is_locked: bool | None = None

    async def append(self, name: str, data: bytes) -> None:
        """See EvidenceStore."""
        _checked(name, data)
        await self._run(lambda: self._append(name, data))

    async def read(self, name: str) -> bytes:
        """See EvidenceStore."""
        _checked(name)
        kept = await self._run(lambda: self._first(name))
        if kept is None:
            raise EvidenceNotFound(name)
        return kept

    async def names(self, prefix: str = "") -> list[str]:
        """See EvidenceStore. A name whose versions are hidden by a delete marker is still there."""
        _checked_prefix(prefix)
        found = {name async for name in self._listed(prefix, is_deep=True)}
        return await self._run(lambda: sorted(found))

    async def entries(self, folder: str = "") -> list[str]:
        """See EvidenceStore."""
        _checked_folder(folder)
        return sorted({name.removeprefix(folder) async for name in self._listed(folder, is_deep=False)})

    async def is_locked(self) -> bool:
        """Whether the server keeps every version for its time; the bucket is made where it is missing."""
        return await self._run(self._ensure_bucket)

    async def close(self) -> None:
        """See EvidenceStore."""
        self._thread.close()
        self._connections.clear()

    async def _listed(self, prefix: str, *, is_deep: bool) -> AsyncIterator[str]:
        """Names, one for each version; and where it is not deep, `folder/` in the place of all below it."""
        listing = self._client.list_objects(self._bucket, prefix, recursive=is_deep, include_version=True)
        while some := await self._run(lambda: self._step(listing)):
            for found in some:
                name = found.object_name or ""
                # Tools make objects `folder/` to show an empty one: that is no name.
                shape = name if is_deep else name.removesuffix("/")
                if not found.is_delete_marker and name != prefix and _NAME.fullmatch(shape):
                    yield name

    async def _run(self, call: Callable[[], _Result]) -> _Result:
        def bounded() -> _Result:
            try:
                return call()
            except EvidenceUnavailable:
                raise
            except (MinioException, HTTPError, OSError, ParseError, UnicodeDecodeError) as problem:
                raise _unavailable(problem) from problem

        return await self._thread.run(bounded)

    def _append(self, name: str, data: bytes) -> None:
        if not self._ensure_bucket() and self._needs_lock:
            message = f"bucket {self._bucket} has no object lock: what it keeps could be replaced"
            raise EvidenceUnavailable(message)
        kept = self._first(name)
        if kept is None:
            self._put(name, data)
            kept = self._first(name)  # another process may have been a moment earlier
        if kept != data:
            message = f"other bytes are kept under {name}"
            raise EvidenceExists(message)

    def _put(self, name: str, data: bytes) -> None:
        retention = None
        if self._is_locked and self._retention:
            retention = Retention(mode=COMPLIANCE, retain_until_date=datetime.now(UTC) + self._retention)
        # A server takes nothing under a lock without a checksum of it.
        checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
        self._client.put_object(
            self._bucket,
            name,
            io.BytesIO(data),
            len(data),
            content_type="application/json",
            metadata={"x-amz-sdk-checksum-algorithm": "SHA256", "x-amz-checksum-sha256": checksum},
            retention=retention,
        )

    def _first(self, name: str) -> bytes | None:
        """The oldest version's bytes; servers list versions of a name from the newest to the oldest."""
        versions = [version for found, version in self._versions(name) if found == name]
        if not versions:
            return None
        answer = self._client.get_object(self._bucket, name, version_id=versions[-1])
        try:
            return answer.read()
        finally:
            answer.close()
            answer.release_conn()

    def _versions(self, prefix: str) -> list[tuple[str, str | None]]:
        listing = self._client.list_objects(self._bucket, prefix, recursive=True, include_version=True)
        listed: list[Object] = []
        while some := self._step(listing):
            listed += some
        return [
            (found.object_name, found.version_id)
            for found in listed
            if found.object_name is not None and not found.is_delete_marker
        ]

    def _step(self, listing: Iterator[Object]) -> list[Object]:
        try:
            return list(islice(listing, LISTED_AT_ONCE))
        except S3Error as problem:
            if problem.code == "NoSuchBucket":
                return []
            raise

    def _ensure_bucket(self) -> bool:
        """Make the bucket where it is missing; whether it locks its objects. Asked once a process."""
        if self._is_locked is not None:
            return self._is_locked
        ensure_bucket(self._client, self._bucket, object_lock=True)
        try:
            self._client.get_object_lock_config(self._bucket)
        except S3Error as problem:
            if problem.code not in _NO_LOCK:
                raise
            self._is_locked = False
        else:
            self._is_locked = True
        return self._is_locked


class _Thread:
    """One thread for blocking calls, one after another, with a deadline that counts the wait for it too."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(self, call: Callable[[], _Result]) -> _Result:
        try:
            async with asyncio.timeout(_DEADLINE_SECONDS):
                return await asyncio.get_running_loop().run_in_executor(self._pool, call)
        except TimeoutError as problem:
            message = "the evidence store did not answer in time"
            raise EvidenceUnavailable(message) from problem

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _checked(name: str, data: bytes = b"-") -> str:
    if not _NAME.fullmatch(name) or not data:
        message = "evidence has a name of one to eight segments of letters, digits, '.', '_' and '-', and is not empty"
        raise ValueError(message)
    return name


def _checked_prefix(prefix: str) -> None:
    if not _PREFIX.fullmatch(prefix):
        message = "a prefix is the beginning of a name"
        raise ValueError(message)


def _checked_folder(folder: str) -> None:
    if folder and (not folder.endswith("/") or not _PREFIX.fullmatch(folder)):
        message = "a folder is the beginning of a name, up to a slash"
        raise ValueError(message)


def _unavailable(problem: Exception) -> EvidenceUnavailable:
    return EvidenceUnavailable(f"the evidence store failed: {type(problem).__name__}: {problem}")
