"""What readers of a share are promised: a whole generation, the very one that was published, or a reason why not."""

import hashlib
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import generations
from storage.generations import (
    MANIFEST,
    BadGeneration,
    DiskUse,
    FileEntry,
    GenerationExists,
    GenerationStore,
    GenerationStoreUnavailable,
    Manifest,
    MeasuredRecall,
)

GALLERY, EPOCH = "0199-gallery", "0199-epoch"
DAMAGES = 1000


def seeded(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - damage, not secrets


CONTENT = {"codes": seeded(1).randbytes(3000), "ids": seeded(2).randbytes(700), "vectors.f16": b""}


def manifest(gallery_id: str = GALLERY, epoch: str = EPOCH, number: int = 1) -> Manifest:
    return Manifest(
        gallery_id=gallery_id,
        epoch=epoch,
        number=number,
        contract="a-contract",
        rotation="a-rotation",
        dimension=512,
        kind="faiss",
        lists=1,
        count=20_000,
        watermark=20_100,
        threshold=0.41,
        margin={"faiss": 0.13, "compiled": 0.11},
        probes=None,
        recall={"faiss": MeasuredRecall(pairs=6000, misses=0, lower_bound=0.9995, target=0.9995)},
        built_at=datetime(2026, 1, 2, tzinfo=UTC),
        built_by="idem 0.1.0, faiss 1.15.1",
    )


def staged(store: GenerationStore, named: Manifest, content: dict[str, bytes]) -> Path:
    folder = store.stage(named.gallery_id, named.epoch, named.number)
    for file, data in content.items():
        (folder / file).write_bytes(data)
    return folder


def published(
    store: GenerationStore, named: Manifest | None = None, content: dict[str, bytes] | None = None
) -> tuple[Path, str]:
    """The generation's folder on the share, and its digest."""
    named = named or manifest()
    folder = staged(store, named, CONTENT if content is None else content)
    digest = store.commit_files(folder, named)
    return folder.parent / f"{named.epoch}-{named.number}", digest


def fetched(store: GenerationStore, digest: str, number: int = 1) -> tuple[Path, Manifest]:
    return store.fetch(GALLERY, EPOCH, number, digest)


def refusal(store: GenerationStore, digest: str, number: int = 1) -> BadGeneration:
    """Why the original is refused; the copying and the verifying reader agree on it, and no copy remains."""
    with pytest.raises(BadGeneration) as of_fetch:
        fetched(store, digest, number)
    with pytest.raises(BadGeneration) as of_verify:
        store.verify(GALLERY, EPOCH, number, digest)
    assert str(of_fetch.value) == str(of_verify.value)
    assert store.disk_use(GALLERY).cache == 0
    return of_fetch.value


def rewrite(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)


@pytest.fixture
def share(tmp_path: Path) -> Path:
    return tmp_path / "share"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def store(share: Path, cache: Path) -> GenerationStore:
    return GenerationStore(share, cache)


def test_a_host_gets_the_bytes_that_were_published(store: GenerationStore, cache: Path) -> None:
    _, digest = published(store)
    copy, found = fetched(store, digest)
    assert copy.is_relative_to(cache)
    assert {file: (copy / file).read_bytes() for file in CONTENT} == CONTENT
    assert found.model_copy(update={"files": {}}) == manifest()
    assert store.verify(GALLERY, EPOCH, 1, digest) == found
    assert found.size == sum(map(len, CONTENT.values()))


@given(
    content=st.dictionaries(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True), st.binary(), max_size=5)
)
def test_any_files_come_back_as_they_were(content: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    content.pop(MANIFEST, None)
    folder = tmp_path_factory.mktemp("any")
    store = GenerationStore(folder / "share", folder / "cache")
    copy, _ = fetched(store, published(store, content=content)[1])
    assert {file.name: file.read_bytes() for file in copy.iterdir() if file.name != MANIFEST} == content


def test_a_file_larger_than_a_block_is_copied_whole_and_its_progress_told(store: GenerationStore) -> None:
    large = seeded(3).randbytes(2_500_000)
    told: list[tuple[int, int]] = []
    folder = staged(store, manifest(), {"large": large, "small": b"x"})
    digest = store.commit_files(folder, manifest(), lambda done, total: told.append((done, total)))
    assert told[-1] == (2_500_001, 2_500_001)
    told.clear()
    copy, _ = store.fetch(GALLERY, EPOCH, 1, digest, lambda done, total: told.append((done, total)))
    assert (copy / "large").read_bytes() == large
    assert told[-1] == (5_000_002, 5_000_002), "copied, and read back"
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert len(told) >= 8


def test_only_the_owner_may_read_originals_and_copies_and_nobody_may_write(
    store: GenerationStore, share: Path, cache: Path
) -> None:
    cache.mkdir(mode=0o777)
    cache.chmod(0o777)
    original, digest = published(store)
    copy, _ = fetched(store, digest)
    for folder in (original.parent, original, cache, copy.parent, copy):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
    for file in [*original.iterdir(), *copy.iterdir()]:
        assert stat.S_IMODE(file.stat().st_mode) == 0o400, file


def test_h89_every_single_changed_byte_is_refused_and_named(store: GenerationStore) -> None:
    original, digest = published(store)
    chance = seeded(20_26)
    files = [file for file in sorted(original.iterdir()) if file.stat().st_size]
    assert len(files) == 3
    for _ in range(DAMAGES):
        (file,) = chance.choices(files, [file.stat().st_size for file in files])
        good = file.read_bytes()
        bad, place = bytearray(good), chance.randrange(len(good))
        bad[place] ^= chance.randrange(1, 256)
        rewrite(file, bytes(bad))
        problem = refusal(store, digest)
        assert file.name in problem.reason
        assert problem.fault in {"corrupt", "foreign"}
        rewrite(file, good)
    fetched(store, digest)


def test_h88_every_truncation_and_every_appended_byte_is_refused_and_named(store: GenerationStore) -> None:
    original, digest = published(store)
    chance = seeded(7)
    for file in sorted(original.iterdir()):
        good = file.read_bytes()
        shorter = [good[: chance.randrange(len(good))] for _ in range(20)] if good else []
        for bad in [*shorter, good + b"\0", good + chance.randbytes(100)]:
            rewrite(file, bad)
            problem = refusal(store, digest)
            assert file.name in problem.reason
            assert problem.fault == ("corrupt" if file.name == MANIFEST else "truncated")
            assert file.name == MANIFEST or "was published with" in problem.reason, "told before anything was read"
        rewrite(file, good)
    fetched(store, digest)


def test_swapped_files_are_refused(store: GenerationStore) -> None:
    content = {"codes": b"the same", "ids": b"lengths!"}
    original, digest = published(store, content=content)
    rewrite(original / "codes", content["ids"])
    rewrite(original / "ids", content["codes"])
    assert refusal(store, digest).fault == "corrupt"


@pytest.mark.parametrize(
    "other", [{"gallery_id": "another-gallery"}, {"epoch": "another-epoch"}, {"number": 2}], ids=lambda o: next(iter(o))
)
def test_the_whole_of_another_generation_in_its_place_is_refused(
    store: GenerationStore, other: dict[str, str | int]
) -> None:
    original, digest = published(store)
    foreign, foreign_digest = published(store, manifest(**other))  # type: ignore[arg-type]
    shutil.rmtree(original)
    shutil.copytree(foreign, original)
    problem = refusal(store, digest)
    assert problem.fault == "foreign"
    assert str(next(iter(other.values()))) in problem.reason
    assert refusal(store, foreign_digest).fault == "foreign", "its own digest does not help it"


@pytest.mark.parametrize("file", [MANIFEST, "codes"])
def test_one_file_of_an_older_generation_is_refused(store: GenerationStore, file: str) -> None:
    older, _ = published(store)
    newer, digest = published(store, manifest(number=2), CONTENT | {"codes": seeded(9).randbytes(3000)})
    rewrite(newer / file, (older / file).read_bytes())
    assert refusal(store, digest, number=2).fault == ("foreign" if file == MANIFEST else "corrupt")


def test_an_edited_manifest_with_right_hashes_inside_is_refused(store: GenerationStore) -> None:
    original, digest = published(store)
    text = (original / MANIFEST).read_bytes()
    found = Manifest.model_validate_json(text)
    other_bytes = GenerationStore(original.parent.parent, original.parent.parent.parent / "other")
    forged, _ = published(other_bytes, manifest(number=5), CONTENT | {"ids": b"forged"})
    entry = Manifest.model_validate_json((forged / MANIFEST).read_bytes()).files["ids"]
    rewrite(original / "ids", b"forged")
    edited = found.model_copy(update={"files": {**found.files, "ids": entry}, "count": 1})
    rewrite(original / MANIFEST, edited.model_dump_json(indent=1).encode())
    problem = refusal(store, digest)
    assert (problem.fault, MANIFEST in problem.reason) == ("corrupt", True)


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (b'"format": 2', "form"),
        (b'"format": 1, "more": 1', "form"),
        (b'"format": NaN', "form"),
    ],
)
def test_a_manifest_of_an_unknown_form_is_refused_even_when_it_is_the_published_one(
    store: GenerationStore, edit: bytes, word: str
) -> None:
    original, _ = published(store)
    text = (original / MANIFEST).read_bytes().replace(b'"format": 1', edit)
    rewrite(original / MANIFEST, text)
    problem = refusal(store, hashlib.sha256(text).hexdigest())
    assert (problem.fault, word in problem.reason) == ("unreadable", True)


@pytest.mark.parametrize("name", ["../outside", "a/b", ".hidden", "", "a\n", "x" * 65])
def test_no_manifest_can_name_a_file_outside_of_its_folder(name: str) -> None:
    entry = FileEntry(size=1, sha256="0" * 64)
    text = manifest().model_copy(update={"files": {name: entry}}).model_dump_json()
    with pytest.raises(ValueError, match="files"):
        Manifest.model_validate_json(text)


def test_an_absurd_size_is_refused_before_anything_is_read(store: GenerationStore) -> None:
    for size in (-1, 2**62):
        with pytest.raises(ValueError, match="size"):
            FileEntry(size=size, sha256="0" * 64)
    original, digest = published(store)
    rewrite(original / MANIFEST, b" " * 2_000_000)
    assert refusal(store, digest).fault == "truncated"


def test_a_file_of_a_terabyte_is_refused_at_once(store: GenerationStore) -> None:
    original, digest = published(store)
    (original / "codes").chmod(0o600)
    os.truncate(original / "codes", 2**40)  # sparse: to read it would take a quarter of an hour
    assert refusal(store, digest).fault == "truncated"


def test_links_pipes_folders_and_unknown_files_are_refused(store: GenerationStore, tmp_path: Path) -> None:
    original, digest = published(store)
    moved = tmp_path / "moved"
    good = original / "codes"
    good.rename(moved)

    def refused_as_foreign() -> None:
        assert refusal(store, digest).fault == "foreign"

    good.symlink_to(moved)
    refused_as_foreign()
    good.unlink()
    os.mkfifo(good)
    refused_as_foreign()
    good.unlink()
    good.mkdir()
    refused_as_foreign()
    good.rmdir()
    assert refusal(store, digest).fault == "missing"
    moved.rename(good)
    (original / "more").write_bytes(b"")
    refused_as_foreign()
    (original / "more").unlink()
    original.rename(moved)
    original.symlink_to(moved)
    refused_as_foreign()
    original.unlink()
    moved.rename(original)
    fetched(store, digest)


def test_h92_what_is_not_there_is_told_apart_from_a_share_that_is_not_mounted(
    store: GenerationStore, share: Path
) -> None:
    _, digest = published(store)
    assert refusal(store, digest, number=2).fault == "missing"
    with pytest.raises(BadGeneration, match="not there"):
        store.fetch("no-gallery", EPOCH, 1, digest)
    share.rename(share.with_name("elsewhere"))
    with pytest.raises(GenerationStoreUnavailable, match="mounted"):
        fetched(store, digest)
    assert store.galleries() == store.listed(GALLERY) == []


def test_h92_a_host_that_has_a_copy_needs_no_share(store: GenerationStore, share: Path) -> None:
    _, digest = published(store)
    first, _ = fetched(store, digest)
    shutil.rmtree(share)
    assert fetched(store, digest)[0] == first


def test_a_generation_that_vanishes_in_the_middle_of_a_copy_is_missing(store: GenerationStore) -> None:
    original, digest = published(store, content={"a": b"a" * 10, "b": b"b" * 10})

    def vanish(done: int, total: int) -> None:
        if done == 10:
            shutil.rmtree(original)

    with pytest.raises(BadGeneration) as problem:
        store.fetch(GALLERY, EPOCH, 1, digest, vanish)
    assert problem.value.fault == "missing"
    assert store.disk_use(GALLERY).cache == 0


def test_a_copy_that_goes_bad_on_the_local_disk_is_made_anew(store: GenerationStore) -> None:
    _, digest = published(store)
    copy, _ = fetched(store, digest)
    damages: list[Callable[[], object]] = [
        lambda: rewrite(copy / "codes", CONTENT["codes"][:-1] + b"\0"),
        lambda: rewrite(copy / "ids", b""),
        (copy / "ids").unlink,
        lambda: (copy / "more").write_bytes(b""),
        lambda: rewrite(copy / MANIFEST, b"{}"),
        lambda: shutil.rmtree(copy),
        lambda: shutil.rmtree(copy) or copy.write_bytes(b""),
    ]
    for damage in damages:
        damage()
        assert fetched(store, digest)[0] == copy
        assert {file: (copy / file).read_bytes() for file in CONTENT} == CONTENT
    assert list(copy.parent.iterdir()) == [copy]


def test_a_disk_that_does_not_keep_what_was_written_is_blamed_and_not_the_generation(
    store: GenerationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, digest = published(store)
    write = os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(len(data))))
        with pytest.raises(GenerationStoreUnavailable, match="disk failing"):
            fetched(store, digest)
    assert store.disk_use(GALLERY).cache == 0
    fetched(store, digest)


def test_h93_a_full_disk_is_told_and_leaves_nothing(
    store: GenerationStore, monkeypatch: pytest.MonkeyPatch, share: Path
) -> None:
    _, digest = published(store)
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, most))
    try:
        with pytest.raises(GenerationStoreUnavailable, match="full"):
            fetched(store, digest)
        with pytest.raises(OSError, match="large"):
            staged(store, manifest(number=2), CONTENT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert store.disk_use(GALLERY).cache == 0
    free = shutil.disk_usage(share)._replace(free=1000)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: free)
        with pytest.raises(GenerationStoreUnavailable, match="MB are free"):
            fetched(store, digest)
    fetched(store, digest)


def test_a_cache_that_cannot_be_made_is_told(store: GenerationStore, cache: Path) -> None:
    _, digest = published(store)
    cache.write_bytes(b"a file where the folder should be")
    with pytest.raises(GenerationStoreUnavailable):
        fetched(store, digest)


# --- publishers that die, and those that only slept ------------------------------------------------------------------


class Killed(BaseException):
    """As if the process ended here."""


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[str]]]:
    """Kill the publisher before its n-th step that a disk would notice; gives the list of steps that it took."""
    steps: list[str] = []

    def arm(fatal: int) -> list[str]:
        steps.clear()
        for name in ("mkdir", "fchmod", "fsync", "replace", "rename", "write", "open"):
            real = getattr(os, name)

            def step(*args: object, _real: Callable[..., object] = real, _name: str = name, **more: object) -> object:
                steps.append(_name)
                if len(steps) > fatal:
                    raise Killed
                return _real(*args, **more)

            monkeypatch.setattr(os, name, step)
        return steps

    yield arm
    monkeypatch.undo()


def test_h91_a_publisher_killed_at_any_step_leaves_nothing_that_can_be_fetched_and_the_next_one_publishes(
    share: Path, cache: Path, killed_at: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    share.mkdir()
    store = GenerationStore(share, cache)
    killed = 0
    for fatal in range(200):
        number = fatal + 1
        steps = killed_at(fatal)
        digest = None
        try:
            folder = staged(store, manifest(number=number), CONTENT)
            digest = store.commit_files(folder, manifest(number=number))
        except Killed:
            killed += 1
        finally:
            monkeypatch.undo()
        if digest is not None:
            break
        if (EPOCH, number) in store.listed(GALLERY):  # killed after the rename: whole, but nobody knows its digest
            assert steps[:fatal].count("rename") == 1
        with pytest.raises(BadGeneration):
            store.fetch(GALLERY, EPOCH, number, "0" * 64)
    assert killed > 10
    assert digest is not None
    fetched(store, digest, number)
    store.drop(GALLERY, {(EPOCH, number)})
    assert list((share / GALLERY).iterdir()) == [share / GALLERY / f"{EPOCH}-{number}"], "what the dead left is swept"


def test_what_a_killed_publisher_left_is_removed_by_the_next_of_that_number(store: GenerationStore) -> None:
    left = staged(store, manifest(), CONTENT)
    again = store.stage(GALLERY, EPOCH, 1)
    assert not left.exists()
    assert list(again.iterdir()) == []


def test_h91_a_publisher_that_slept_cannot_write_into_its_successors_folder_nor_commit_over_it(
    store: GenerationStore,
) -> None:
    slept = staged(store, manifest(), CONTENT)
    _, digest = published(store, content={"codes": b"the successor's"})
    with pytest.raises(FileNotFoundError):
        (slept / "codes").write_bytes(b"late")
    with pytest.raises(GenerationStoreUnavailable):
        store.commit_files(slept, manifest())
    copy, _ = fetched(store, digest)
    assert (copy / "codes").read_bytes() == b"the successor's"


def test_a_number_is_used_once(store: GenerationStore) -> None:
    first, digest = published(store, content={"a": b"first"})
    with pytest.raises(GenerationExists):
        store.stage(GALLERY, EPOCH, 1)
    aside = first.with_name("aside")
    first.rename(aside)
    late = staged(store, manifest(), CONTENT)
    aside.rename(first)
    with pytest.raises(GenerationExists):
        store.commit_files(late, manifest())
    fetched(store, digest)


def test_a_rename_whose_answer_was_lost_counts(store: GenerationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = staged(store, manifest(), CONTENT)
    rename = os.rename

    def answer_lost(*args: object, **more: object) -> None:
        rename(*args, **more)  # type: ignore[arg-type]
        raise FileNotFoundError(2, "No such file or directory")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", answer_lost)
        digest = store.commit_files(folder, manifest())
    fetched(store, digest)


def test_only_plain_files_of_a_staged_folder_are_published(store: GenerationStore, tmp_path: Path) -> None:
    folder = staged(store, manifest(), CONTENT)
    for number in (2, 3):
        with pytest.raises(ValueError, match="not staged"):
            store.commit_files(folder, manifest(number=number))
    with pytest.raises(ValueError, match="not staged"):
        store.commit_files(tmp_path / folder.name, manifest())
    for name, make in {
        "folder": Path.mkdir,
        "link": lambda path: path.symlink_to("codes"),
        MANIFEST: Path.touch,
        ".hidden": Path.touch,
    }.items():
        make(folder / name)
        with pytest.raises(ValueError, match=name):
            store.commit_files(folder, manifest())
        (folder / name).rmdir() if name == "folder" else (folder / name).unlink()
    store.commit_files(folder, manifest())


@pytest.mark.parametrize("bad", ["", "..", "a/b", "a\0b", ".hidden", "x" * 65, "a\n"])
def test_ids_that_could_lead_elsewhere_are_no_ids(store: GenerationStore, bad: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.stage(bad, EPOCH, 1),
        lambda: store.stage(GALLERY, bad, 1),
        lambda: store.fetch(bad, EPOCH, 1, ""),
        lambda: store.fetch(GALLERY, bad, 1, ""),
        lambda: store.verify(bad, EPOCH, 1, ""),
        lambda: store.listed(bad),
        lambda: store.drop(bad, set()),
        lambda: store.drop_copies(bad, set()),
        lambda: store.drop_gallery(bad),
        lambda: store.disk_use(bad),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="cannot be the"):
            call()
    with pytest.raises(ValueError, match="cannot be the"):
        store.stage(GALLERY, EPOCH, -1)


# --- several processes of one host -----------------------------------------------------------------------------------

READER = f"""
import sys
from pathlib import Path
from storage.generations import GenerationStore
totals = []
store = GenerationStore(Path(sys.argv[1]), Path(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
copy, manifest = store.fetch({GALLERY!r}, {EPOCH!r}, 1, sys.argv[3], lambda done, total: totals.append(total))
print(totals[-1] > manifest.size, (copy / "codes").stat().st_ino, flush=True)
"""


def test_processes_that_fetch_at_once_make_one_copy_and_all_open_it(
    store: GenerationStore, share: Path, cache: Path
) -> None:
    _, digest = published(store, content={"codes": seeded(4).randbytes(40_000_000)})
    command = [sys.executable, "-c", READER, str(share), str(cache), digest]
    readers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
    for reader in readers:
        assert reader.stdin is not None
        reader.stdin.write("go\n")
        reader.stdin.flush()
    told = [reader.communicate(timeout=30)[0].split() for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0, 0]
    assert sorted(copied for copied, _ in told) == ["False", "False", "True"], "one copies, the others wait and check"
    assert len({inode for _, inode in told}) == 1
    assert list((cache / GALLERY).iterdir()) == [cache / GALLERY / f"{EPOCH}-1"]


def test_threads_that_fetch_at_once_make_one_copy(store: GenerationStore) -> None:
    _, digest = published(store, content={"codes": seeded(5).randbytes(5_000_000)})
    together, copied = threading.Barrier(4), []

    def fetch() -> None:
        totals: list[int] = []
        together.wait()
        _, found = store.fetch(GALLERY, EPOCH, 1, digest, lambda _, total: totals.append(total))
        copied.append(totals[-1] > found.size)

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(copied) == [False, False, False, True]


def test_a_process_killed_in_the_middle_of_copying_holds_up_nobody(
    store: GenerationStore, share: Path, cache: Path
) -> None:
    _, digest = published(store, content={"codes": seeded(6).randbytes(40_000_000)})
    stuck = READER.replace("totals.append(total)", 'print(done, flush=True) or __import__("time").sleep(60)')
    with subprocess.Popen(
        [sys.executable, "-c", stuck, str(share), str(cache), digest],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        reader.stdin.write("go\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == "ready\n"
        assert int(reader.stdout.readline()) > 0, "it has begun to copy"
        reader.send_signal(signal.SIGKILL)
    assert len(list((cache / GALLERY).glob(".*.tmp"))) == 1
    fetched(store, digest)
    assert list((cache / GALLERY).iterdir()) == [cache / GALLERY / f"{EPOCH}-1"], "what it left is swept"


def test_a_process_that_hangs_while_copying_holds_up_nobody_who_has_a_copy(store: GenerationStore) -> None:
    _, first = published(store)
    _, second = published(store, manifest(number=2))
    fetched(store, first)
    copying, go_on = threading.Event(), threading.Event()

    def hang(done: int, total: int) -> None:
        copying.set()
        go_on.wait(20)

    hanging = threading.Thread(target=lambda: store.fetch(GALLERY, EPOCH, 2, second, hang))
    hanging.start()
    assert copying.wait(20)
    started = time.monotonic()
    fetched(store, first)
    assert time.monotonic() - started < 5
    go_on.set()
    hanging.join()


# --- dropping --------------------------------------------------------------------------------------------------------


def test_dropping_keeps_what_is_named_and_what_is_newer(store: GenerationStore, share: Path) -> None:
    for number in range(1, 7):
        published(store, manifest(number=number))
    staged(store, manifest(number=3_000), CONTENT)
    for number in (2, 5):
        (share / GALLERY / f".{EPOCH}-{number}.0123456789abcdef.tmp").mkdir()
    dropped = store.drop(GALLERY, {(EPOCH, 5), (EPOCH, 3)})
    assert [name.number for name in dropped] == [1, 2, 2, 4, 5], "with what was half written of 2 and 5"
    assert [name.number for name in store.listed(GALLERY)] == [3, 5, 6], "6 may be about to be committed"
    assert len(list((share / GALLERY).glob(".*.tmp"))) == 1, "a publisher is at work on 3,000"
    assert store.drop(GALLERY, {(EPOCH, 5), (EPOCH, 3)}) == []
    assert store.drop(GALLERY, set()) == [], "nothing tells what is old"


def test_another_epochs_generations_go_when_they_are_older_whatever_their_number(
    store: GenerationStore, share: Path
) -> None:
    before, _ = published(store, manifest(epoch="epoch-before", number=900))
    os.utime(before, (1, 1))
    published(store)
    after, _ = published(store, manifest(epoch="epoch-after", number=1))
    later = time.time() + 60
    os.utime(after, (later, later))
    assert store.drop(GALLERY, {(EPOCH, 1)}) == [("epoch-before", 900)]
    assert set(store.listed(GALLERY)) == {("epoch-after", 1), (EPOCH, 1)}


def test_another_epochs_lower_numbers_go_although_nothing_of_this_epoch_is_there_yet(store: GenerationStore) -> None:
    published(store, manifest(epoch="epoch-before", number=3))
    published(store, manifest(epoch="epoch-after", number=6))
    assert store.drop(GALLERY, {(EPOCH, 5)}) == [("epoch-before", 3)]
    assert store.listed(GALLERY) == [("epoch-after", 6)], "its publisher has had the lease since"


def test_copies_are_dropped_by_the_same_rule_and_mapped_ones_stay_readable(store: GenerationStore) -> None:
    digests = [published(store, manifest(number=number))[1] for number in (1, 2, 3)]
    copies = [fetched(store, digest, number)[0] for number, digest in enumerate(digests, 1)]
    with (copies[0] / "codes").open("rb") as mapped:
        assert [name.number for name in store.drop_copies(GALLERY, {(EPOCH, 2)})] == [1]
        assert mapped.read() == CONTENT["codes"]
    assert [copy.exists() for copy in copies] == [False, True, True]
    assert store.drop_copies("never-fetched", {(EPOCH, 2)}) == []
    assert [name.number for name in store.listed(GALLERY)] == [1, 2, 3], "originals are another matter"


def test_a_host_knows_its_own_copy_without_the_share(store: GenerationStore, share: Path) -> None:
    _, digest = published(store)
    assert store.copied(GALLERY, EPOCH, 1, digest) is None
    found = fetched(store, digest)
    shutil.rmtree(share)
    assert store.copied(GALLERY, EPOCH, 1, digest) == found
    rewrite(found[0] / "codes", CONTENT["codes"][::-1])
    assert store.copied(GALLERY, EPOCH, 1, digest) is None


def test_whoever_waits_for_a_copy_hears_that_it_gets_on_and_dropping_does_not_wait_for_one_that_hangs(
    store: GenerationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generations, "_PATIENCE_SECONDS", 0.05)
    digests = [published(store, manifest(number=number))[1] for number in (1, 2)]
    first, _ = fetched(store, digests[0])
    is_copying, gets_on, heard = threading.Event(), threading.Event(), threading.Event()
    heard_in_time: list[bool] = []

    def slowly(_done: int, _total: int) -> None:
        if is_copying.is_set():
            heard_in_time.append(heard.wait(10))
        is_copying.set()
        assert gets_on.wait(10)

    def told(_done: int, _total: int) -> None:
        heard.set()

    copying = threading.Thread(target=store.fetch, args=(GALLERY, EPOCH, 2, digests[1], slowly))
    copying.start()
    assert is_copying.wait(10)
    assert store.drop_copies(GALLERY, {(EPOCH, 2)}) == []
    assert store.drop_other_copies([]) == []
    assert first.exists()
    waiting = threading.Thread(target=store.fetch, args=(GALLERY, EPOCH, 2, digests[1], told))
    waiting.start()
    assert not heard.wait(0.1), "nothing gets on"
    gets_on.set()
    copying.join(10)
    waiting.join(10)
    assert heard_in_time[0]
    assert [name.number for name in store.drop_copies(GALLERY, {(EPOCH, 2)})] == [1]


def test_a_gallery_that_is_no_more_leaves_neither_originals_nor_copies(
    store: GenerationStore, share: Path, cache: Path
) -> None:
    _, digest = published(store)
    fetched(store, digest)
    _, other = published(store, manifest(gallery_id="other-gallery"))
    store.fetch("other-gallery", EPOCH, 1, other)
    assert store.galleries() == [GALLERY, "other-gallery"]
    assert store.drop_gallery(GALLERY)
    assert store.drop_gallery(GALLERY), "asked twice, done once"
    assert store.galleries() == ["other-gallery"]
    assert refusal(store, digest).fault == "missing"
    assert store.drop_other_copies({GALLERY}) == ["other-gallery"]
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    assert store.listed("other-gallery") == [(EPOCH, 1)]


def test_disk_use_counts_both_sides(store: GenerationStore) -> None:
    assert store.disk_use(GALLERY) == DiskUse(0, 0)
    original, digest = published(store)
    fetched(store, digest)
    size = sum(file.stat().st_size for file in original.iterdir())
    assert store.disk_use(GALLERY) == DiskUse(size, size)


def test_a_refusal_crosses_a_process_border_whole() -> None:
    import pickle

    problem = BadGeneration("corrupt", "codes holds other bytes")
    again = pickle.loads(pickle.dumps(problem))  # noqa: S301 - our own
    assert (again.fault, again.reason, str(again)) == ("corrupt", problem.reason, problem.reason)
