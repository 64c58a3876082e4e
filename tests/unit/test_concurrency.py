"""Work at once: the first error is the answer, and nothing goes on after it."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

from app.audit import Action
from app.concurrency import all_of
from app.documents.galleries import Gallery
from app.errors import Advice, LowQuality
from app.fair_executor import FairExecutor
from app.runtime import Runtime
from app.use_cases import compare, enrol

#: Far longer than anything takes here.
WITHIN_SECONDS = 10.0


class Photo:
    """Something that a frame refers to."""


async def test_results_come_in_the_order_of_the_arguments() -> None:
    assert await all_of(asyncio.sleep(0.01, "one"), asyncio.sleep(0, "two")) == ["one", "two"]
    assert await all_of() == []


async def test_the_first_error_is_raised_when_all_others_have_ended() -> None:
    ended: list[str] = []

    async def goes_on(name: str) -> None:
        try:
            await asyncio.sleep(WITHIN_SECONDS)
        finally:
            await asyncio.sleep(0)
            ended.append(name)

    async def fails(error: Exception) -> None:
        await asyncio.sleep(0)
        raise error

    with pytest.raises(KeyError):
        await all_of(goes_on("one"), fails(KeyError()), goes_on("two"), fails(ValueError()))
    assert ended == ["one", "two"]


async def test_a_cancellation_reaches_all() -> None:
    waiting = [asyncio.Event(), asyncio.Event()]
    tasks = [asyncio.create_task(event.wait()) for event in waiting]
    whole = asyncio.create_task(all_of(*tasks))
    await asyncio.sleep(0)
    whole.cancel()
    with pytest.raises(asyncio.CancelledError):
        await whole
    assert all(task.cancelled() for task in tasks)


async def test_a_cancellation_lets_all_end_in_their_own_time() -> None:
    ended: list[str] = []

    async def goes_on(name: str, steps: int) -> None:
        try:
            await asyncio.sleep(WITHIN_SECONDS)
        finally:
            for _ in range(steps):
                await asyncio.sleep(0)
            ended.append(name)

    whole = asyncio.create_task(all_of(goes_on("one", 0), goes_on("two", 5), goes_on("three", 10)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    whole.cancel()
    with pytest.raises(asyncio.CancelledError):
        await whole
    assert ended == ["one", "two", "three"]


async def test_nothing_of_the_failed_work_stays_in_memory() -> None:
    photo = Photo()
    seen = weakref.ref(photo)

    async def read(photo: Photo) -> None:
        await asyncio.sleep(0)
        raise ValueError(type(photo))

    async def request(photo: Photo) -> str:
        try:
            await all_of(read(photo), asyncio.sleep(WITHIN_SECONDS))
        except ValueError:
            return "refused"
        return "read"

    gc.disable()
    try:
        answer = await request(photo)
        del photo
        await asyncio.sleep(0)  # callbacks of the tasks that have ended
        assert answer == "refused"
        assert seen() is None
    finally:
        gc.enable()


Reading = Callable[[Runtime, Action, Gallery, list[bytes]], Awaitable[object]]


async def _compare(runtime: Runtime, action: Action, gallery: Gallery, photos: list[bytes]) -> object:
    return await compare.compare(runtime, action, gallery, *photos[:2])


@pytest.mark.parametrize("use", [enrol._read, _compare], ids=["enrol", "compare"])
async def test_after_a_refused_photo_the_others_of_the_request_do_not_wait_on(
    use: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, gate = FairExecutor(1, 100), threading.Event()

    async def compute_long(caller: str, work: Callable[..., object], *arguments: object) -> object:
        return await executor.run(caller, lambda: work(*arguments))

    def read_face(_: object, photo: bytes, *__: object) -> None:
        if photo == b"bad":
            raise LowQuality("blurred", errors=(Advice("photo", "blurred", "Hold still."),))
        gate.wait(WITHIN_SECONDS)

    for module in (enrol, compare):
        monkeypatch.setattr(module, "read_face", read_face)
    runtime = SimpleNamespace(
        reader=None, engine=None, compute_long=compute_long,
        require_contract=lambda _: None,
    )  # fmt: skip
    action, gallery = SimpleNamespace(actor_id="app-1"), SimpleNamespace(policy=None)
    before = asyncio.all_tasks()
    try:
        with pytest.raises(LowQuality) as refused:
            await use(runtime, action, gallery, [b"bad", *[b"good"] * 4])  # type: ignore[arg-type] # as far as it is used
        assert executor.waiting == 0
        assert asyncio.all_tasks() == before
        assert refused.value.errors[0].field == ("photo_a" if use is _compare else "photo")
    finally:
        gate.set()
        executor.shutdown()
