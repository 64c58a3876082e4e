"""Where photos lie: in a local folder, or on an S3 server. Both take opaque bytes (already sealed) and know no people.

Keys look like `gallery/identity/sample`. What a key may hold is the same for every store, so that photos can move from
one to another, and no key can lead out of a store's root.
"""

import asyncio
import io
import itertools
import os
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self, TypeVar
from xml.etree.ElementTree import ParseError

import urllib3
from minio import Minio
from minio.datatypes import Object
from minio.deleteobjects import DeleteObject
from minio.error import MinioException, S3Error
from urllib3 import BaseHTTPResponse
from urllib3.connectionpool import ConnectionPool
from urllib3.exceptions import HTTPError, MaxRetryError, ProtocolError

from storage.ownership import BucketPlace, Guard, NotOurs, ensure_bucket

#: One to eight segments; none begins with a dot, so neither `..` nor a store's own folders can be named.
_SEGMENT: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_KEY: Final = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT}){{0,7}}")
_PREFIX: Final = re.compile(rf"(?:{_SEGMENT}/){{0,7}}(?:{_SEGMENT})?")

#: Blocking calls of one store that run side by side; more than that only makes a disk or a server slower.
_THREADS: Final = 8
_PAGE: Final = 500
#: The name of a file that a put is still writing.
_TEMPORARY: Final = re.compile(r"[0-9a-f]{32}")
#: A put gives up long before: what is older was left by a process that died in the middle of one.
_ABANDONED_SECONDS: Final = 3600
#: Deletions that may remove a folder, one after another, in the microseconds between making it and moving into it.
_TRIES: Final = 100

_Result = TypeVar("_Result")


class PhotoNotFound(LookupError):
    """Nothing lies under that key."""


class PhotoStoreUnavailable(OSError):
    """The store cannot be reached, is too slow, or is broken."""


class PhotosNotOurs(NotOurs, PhotoStoreUnavailable):
    """The photos belong to another store: they can be read but not changed."""


@dataclass(frozen=True, slots=True)
class StoredPhoto:
    """What a listing tells of one photo; `modified` is in UTC."""

    key: str
    modified: datetime


class PhotoStore(Protocol):
    """Bytes under keys. Every method raises ValueError for a key of another shape, PhotoStoreUnavailable on a fault."""

    async def put(self, key: str, data: bytes) -> None:
        """Keep `data` under `key`, in place of what lay there; durable when it returns.

        After PhotoStoreUnavailable it may be there, or come to be there: delete it, or let a sweep do so.
        """

    async def get(self, key: str) -> bytes:
        """The bytes under `key`. Raises PhotoNotFound."""

    async def delete(self, keys: Iterable[str]) -> int:
        """Delete every version of each; missing ones are fine. Returns how many objects were there."""

    def list(self, prefix: str = "") -> AsyncIterator[StoredPhoto]:
        """Every photo whose key starts with `prefix`, in no promised order; changes meanwhile may be seen or not."""

    async def check(self) -> None:
        """Do what a put needs, for real. Raises PhotoStoreUnavailable."""

    async def close(self) -> None:
        """Let go of threads and connections; calls still queued are cancelled."""


class LocalPhotoStore:
    """Photos as files below a folder (0700; files 0600). For one machine, or a share that all processes mount."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        #: Checks the owner before each change. None: no other store can be using the folder.
        self.guard: Guard | None = None
        self._incoming = self._root / ".incoming"
        # No deadline: a disk that is merely slow has still kept the photo.
        self._threads = _Threads("photo-files", deadline_seconds=None)

    async def put(self, key: str, data: bytes) -> None:
        """See PhotoStore. Written beside, fsynced, renamed into place, folders fsynced."""
        path = self._path(key)
        await self._threads.run(lambda: _guarded(self.guard, lambda: self._put(path, data)))

    async def get(self, key: str) -> bytes:
        """See PhotoStore."""
        path = self._path(key)
        return await self._threads.run(lambda: self._get(path))

    async def delete(self, keys: Iterable[str]) -> int:
        """See PhotoStore. Folders that become empty go too: their names are ids of people."""
        paths = [self._path(key) for key in keys]
        return await self._threads.run(lambda: _guarded(self.guard, lambda: sum(self._delete(path) for path in paths)))

    def list(self, prefix: str = "") -> AsyncIterator[StoredPhoto]:
        """See PhotoStore."""
        folder = _checked_prefix(prefix).rpartition("/")[0]
        return self._threads.stream(self._walk(self._root / folder, prefix))

    async def check(self) -> None:
        """See PhotoStore. Writes and removes a small file, and removes what dead processes left half written."""
        await self._threads.run(lambda: _guarded(self.guard, self._check))

    async def close(self) -> None:
        """See PhotoStore."""
        self._threads.close()

    def _path(self, key: str) -> Path:
        return self._root / _checked_key(key)

    def _put(self, path: Path, data: bytes) -> None:
        temporary = self._incoming / uuid.uuid4().hex
        try:
            _make_folders(self._incoming)
            try:
                _write_durably(temporary, data)
                _move(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            self._sync_folders(path.parent)
        except OSError as problem:
            raise _unavailable(problem) from problem

    def _get(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as problem:
            raise PhotoNotFound(self._key(path)) from problem
        except OSError as problem:
            raise _unavailable(problem) from problem

    def _delete(self, path: Path) -> bool:
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return False
        except OSError as problem:
            raise _unavailable(problem) from problem
        folder = path.parent
        with suppress(OSError):  # it holds more, or another deletion was quicker
            while folder != self._root:
                folder.rmdir()
                folder = folder.parent
        try:
            self._sync_folders(folder)
        except OSError as problem:
            raise _unavailable(problem) from problem
        return True

    def _walk(self, folder: Path, prefix: str) -> Iterator[StoredPhoto]:
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as problem:
            raise _unavailable(problem) from problem
        for entry in found:
            key = self._key(Path(entry.path))
            if not _KEY.fullmatch(key):
                continue
            if entry.is_dir(follow_symlinks=False):
                if f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                    yield from self._walk(Path(entry.path), prefix)
            elif key.startswith(prefix):
                try:  # a link counts with its own time: its target does not belong to the store
                    modified = datetime.fromtimestamp(entry.stat(follow_symlinks=False).st_mtime, UTC)
                except FileNotFoundError:  # deleted since the folder was read
                    continue
                except OSError as problem:
                    raise _unavailable(problem) from problem
                yield StoredPhoto(key, modified)

    def _check(self) -> None:
        probe = self._incoming / uuid.uuid4().hex
        try:
            _make_folders(self._incoming)
            probe.write_bytes(b"probe")
            probe.unlink()
            oldest = time.time() - _ABANDONED_SECONDS
            for left in self._incoming.iterdir():
                if _TEMPORARY.fullmatch(left.name) and left.lstat().st_mtime < oldest:
                    left.unlink(missing_ok=True)
        except FileNotFoundError:  # another process's check or put was quicker
            return
        except OSError as problem:
            raise _unavailable(problem) from problem

    def _key(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()

    def _sync_folders(self, folder: Path) -> None:
        """Make `folder`'s entries and all above it durable: another thread may just have created one of them."""
        while True:
            _sync_folder(folder)
            if folder == self._root:
                return
            folder = folder.parent


class MinioPhotoStore:
    """Photos as objects of one bucket on a MinIO-compatible server; the bucket is made when it is missing."""

    def __init__(
        self,
        *,
        endpoint: str,
        access_key: str,
        secret_key: str,
        bucket: str,
        region: str,
        secure: bool,
        timeout_seconds: float = 2.0,
    ) -> None:
        """endpoint: `host:port`; timeout_seconds: how long the server may be silent before the call fails."""
        self._bucket = bucket
        #: Checks the owner before the first change, and at each `check`. None: no other store can be using the bucket.
        self.guard: Guard | None = None
        # The client's own pool waits for five minutes and tries five times.
        self._connections = urllib3.PoolManager(
            maxsize=_THREADS,
            timeout=urllib3.Timeout(connect=timeout_seconds, read=timeout_seconds),
            retries=_OnlyAfterADroppedConnection(total=1, allowed_methods=None),
        )
        self._client = Minio(
            endpoint,
            access_key=access_key,
            secret_key=secret_key,
            region=region,
            secure=secure,
            http_client=self._connections,
        )
        # A little more, for waiting on a thread: when all of them hang, those behind must not wait in turns.
        self._threads = _Threads("photo-objects", deadline_seconds=timeout_seconds + 0.5)

    async def put(self, key: str, data: bytes) -> None:
        """See PhotoStore."""
        _checked_key(key)
        await self._run(lambda: _guarded(self.guard, lambda: self._put(key, data)))

    async def get(self, key: str) -> bytes:
        """See PhotoStore."""
        _checked_key(key)
        return await self._run(lambda: self._get(key))

    async def delete(self, keys: Iterable[str]) -> int:
        """See PhotoStore. On a bucket with versions nothing of an object remains, delete markers neither."""
        waiting = [_checked_key(key) for key in keys]
        there = 0
        for start in range(0, len(waiting), _THREADS):
            batch = waiting[start : start + _THREADS]
            there += sum(
                await asyncio.gather(
                    *(self._run(partial(_guarded, self.guard, partial(self._delete, key))) for key in batch)
                )
            )
        return there

    def list(self, prefix: str = "") -> AsyncIterator[StoredPhoto]:
        """See PhotoStore."""
        _checked_prefix(prefix)
        return self._threads.stream(self._walk(prefix))

    async def check(self) -> None:
        """See PhotoStore. A signed call about the bucket, never the server's own health path."""

        def checked() -> None:
            if self.guard is not None:
                self.guard.forget()
            _guarded(self.guard, lambda: ensure_bucket(self._client, self._bucket))

        await self._run(checked)

    def place(self, setting: str, *, own_names: Iterable[str] = ()) -> BucketPlace:
        """The bucket as a place that has an owner."""
        return BucketPlace(setting, self._client, self._bucket, own_names=own_names)

    async def close(self) -> None:
        """See PhotoStore."""
        self._threads.close()
        self._connections.clear()

    async def _run(self, call: Callable[[], _Result]) -> _Result:
        return await self._threads.run(lambda: _s3_call(call))

    def _put(self, key: str, data: bytes) -> None:
        try:
            self._put_object(key, data)
        except S3Error as problem:
            if problem.code != "NoSuchBucket":
                raise
            ensure_bucket(self._client, self._bucket)
            self._put_object(key, data)

    def _put_object(self, key: str, data: bytes) -> None:
        # One request whatever the size: parts would multiply the round trips, and could be left behind.
        self._client.put_object(self._bucket, key, io.BytesIO(data), len(data), part_size=5 * 1024**3)

    def _get(self, key: str) -> bytes:
        try:
            answer = self._client.get_object(self._bucket, key)
        except S3Error as problem:
            if problem.code in {"NoSuchKey", "NoSuchBucket"}:
                raise PhotoNotFound(key) from problem
            raise
        try:
            return answer.read()
        finally:
            answer.close()
            answer.release_conn()

    def _delete(self, key: str) -> bool:
        try:
            versions = [
                found
                for found in self._client.list_objects(self._bucket, key, include_version=True)
                if found.object_name == key
            ]
            doomed = [DeleteObject(key, found.version_id) for found in versions]
            refused = next(self._client.remove_objects(self._bucket, doomed), None) if doomed else None
        except S3Error as problem:
            if problem.code == "NoSuchBucket":
                return False
            raise
        if refused is not None:
            message = f"the store refuses to delete: {refused.code}"
            raise PhotoStoreUnavailable(message)
        return any(not found.is_delete_marker for found in versions)

    def _walk(self, prefix: str) -> Iterator[StoredPhoto]:
        pages = self._client.list_objects(self._bucket, prefix, recursive=True)
        while (found := _s3_call(lambda: self._next(pages))) is not None:
            # A key of another shape was not put here by a PhotoStore.
            if found.object_name is not None and found.last_modified is not None and _KEY.fullmatch(found.object_name):
                yield StoredPhoto(found.object_name, found.last_modified.astimezone(UTC))

    def _next(self, pages: Iterator[Object]) -> Object | None:
        try:
            return next(pages, None)
        except S3Error as problem:
            if problem.code == "NoSuchBucket":
                return None
            raise


class _OnlyAfterADroppedConnection(urllib3.Retry):
    """Tries again when the server closed an idle connection at the moment of its use; never after a silence.

    Every call of the store may be repeated.
    """

    def increment(
        self,
        method: str | None = None,
        url: str | None = None,
        response: BaseHTTPResponse | None = None,
        error: Exception | None = None,
        _pool: ConnectionPool | None = None,
        _stacktrace: TracebackType | None = None,
    ) -> Self:
        if error is not None and _pool is not None and not isinstance(error, ProtocolError):
            raise MaxRetryError(_pool, url, error) from error
        return super().increment(method, url, response, error, _pool, _stacktrace)


class _Threads:
    """A store's own bounded pool for blocking calls, with a deadline that counts the wait for a thread too."""

    def __init__(self, name: str, *, deadline_seconds: float | None) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix=name)
        self._deadline_seconds = deadline_seconds

    async def run(self, call: Callable[[], _Result]) -> _Result:
        try:
            async with asyncio.timeout(self._deadline_seconds):
                return await asyncio.get_running_loop().run_in_executor(self._pool, call)
        except TimeoutError as problem:
            message = "the photo store did not answer in time"
            raise PhotoStoreUnavailable(message) from problem

    async def stream(self, found: Iterator[StoredPhoto]) -> AsyncIterator[StoredPhoto]:
        while page := await self.run(lambda: tuple(itertools.islice(found, _PAGE))):
            for photo in page:
                yield photo

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _guarded(guard: Guard | None, change: Callable[[], _Result]) -> _Result:
    """Make the change if this process's store owns the place. Raises PhotosNotOurs, PhotoStoreUnavailable."""
    if guard is not None:
        try:
            guard.require()
        except NotOurs as problem:
            raise PhotosNotOurs(problem.errno, problem.strerror) from problem
        except OSError as problem:
            raise _unavailable(problem) from problem
    return change()


def _s3_call(call: Callable[[], _Result]) -> _Result:
    """Run one S3 call; every fault of client, network or server becomes PhotoStoreUnavailable."""
    try:
        return call()
    except PhotoStoreUnavailable:
        raise
    except (MinioException, HTTPError, OSError, ParseError, UnicodeDecodeError) as problem:
        raise _unavailable(problem) from problem


def _checked_key(key: str) -> str:
    if not _KEY.fullmatch(key):
        message = "a photo's key is one to eight segments of letters, digits, '.', '_' and '-'"
        raise ValueError(message)
    return key


def _checked_prefix(prefix: str) -> str:
    if not _PREFIX.fullmatch(prefix):
        message = "a prefix is the beginning of a photo's key"
        raise ValueError(message)
    return prefix


def _unavailable(problem: Exception) -> PhotoStoreUnavailable:
    return PhotoStoreUnavailable(f"the photo store failed: {type(problem).__name__}: {problem}")


def _make_folders(folder: Path) -> None:
    """Create the folder and those above it, each readable by its owner only."""
    # Not Path.mkdir(exist_ok=True): it looks again whether a folder is there, and a deletion may have come between.
    with suppress(FileExistsError):
        try:
            folder.mkdir(mode=0o700)
        except FileNotFoundError:
            _make_folders(folder.parent)
            folder.mkdir(mode=0o700)


def _write_durably(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _move(temporary: Path, path: Path) -> None:
    """Rename into place, making the folder anew when a deletion of its last photo has just removed it."""
    for _ in range(_TRIES):
        try:
            _make_folders(path.parent)
            temporary.replace(path)
        except FileNotFoundError:
            continue
        return
    message = f"{path.parent.name} is being removed again and again"
    raise FileNotFoundError(message)


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:  # its last photo was deleted meanwhile, and with it the folder
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
