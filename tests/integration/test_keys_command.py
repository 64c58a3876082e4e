"""`idem keys`: what an operator sees of the keys, and that each kind of renewal is reached from there."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
from click.testing import Result
from typer.testing import CliRunner

from app.cli import keys as command
from app.config import random_secret
from app.documents.accounts import SigningKey
from app.documents.root_secret import open_root
from app.documents.tree import AuditKey
from app.keys import KeyRing
from app.runtime import Runtime
from app.use_cases import rotate_keys
from tests.builders import active, default_gallery

Keys = Callable[..., Awaitable[Result]]


@pytest.fixture
async def keys(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Keys:
    """`idem keys ...` on the test's own Runtime, without the minute that a rotation waits for requests."""
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(command, "_run", lambda _, work: asyncio.run_coroutine_threadsafe(work(runtime), loop).result())
    at_once = partial(rotate_keys.rotate_gallery_key, settle_seconds=0)
    monkeypatch.setattr(rotate_keys, "rotate_gallery_key", at_once)

    async def run(*arguments: str) -> Result:
        return await asyncio.to_thread(CliRunner().invoke, command.app, list(arguments))

    return run


async def test_the_command_rotates_galleries_and_tells_what_each_key_has_sealed(runtime: Runtime, keys: Keys) -> None:
    await active(runtime, "ann")
    rotated = await keys("rotate")
    assert rotated.exit_code == 0
    assert "default: 1 data keys are wrapped anew, and the former key is destroyed." in rotated.stdout
    assert (await default_gallery()).wrapped_keys.numbers == [2]
    page = json.loads((await keys("status", "--json")).stdout)
    assert page["galleries"] == [{"gallery": "default", "sealing": 2, "generations": {"2": 1}}]
    (key,) = page["keys"]
    assert (key["key_id"], key["known"], key["newest"]) == (runtime.keys.key_id, True, True)
    assert key["values"] >= 4
    shown = await keys("status")
    assert shown.exit_code == 0
    assert "in use" in shown.stdout
    missing = await keys("rotate", "--gallery", "nowhere")
    assert missing.exit_code == 1


async def test_the_command_changes_the_operators_key(runtime: Runtime, keys: Keys) -> None:
    old, new = runtime.settings.key_encryption_secret(), random_secret()
    before = runtime.keys
    runtime.keys = KeyRing(new, [old])
    await open_root(runtime.keys)
    assert "still needed" in (await keys("status")).stdout
    assert "values are sealed anew" in (await keys("rewrap")).stdout
    shown = await keys("status")
    assert "opens nothing any more" in shown.stdout
    runtime.keys = before  # as if only the old key were given
    shown = await keys("status")
    assert (shown.exit_code, "NOT KNOWN HERE" in shown.stdout) == (1, True)


async def test_the_command_makes_another_signing_key(runtime: Runtime, keys: Keys) -> None:
    made = await keys("rotate", "--signing")
    assert (made.exit_code, "signs from" in made.stdout) == (0, True)
    assert await SigningKey.count() == 2
    assert (await default_gallery()).wrapped_keys.numbers == [1], "nothing else was asked for"
    again = await keys("rotate", "--signing")
    assert again.exit_code == 1
    assert (await keys("rotate", "--signing", "--compromised")).exit_code == 0
    assert await SigningKey.count() == 1


async def test_the_command_makes_another_key_for_the_log(runtime: Runtime, keys: Keys) -> None:
    before = await AuditKey.find_all().to_list()
    made = await keys("rotate", "--audit")
    assert made.exit_code == 0, made.output
    after = await AuditKey.find_all().sort("created_at").to_list()
    assert len(after) == len(before) + 1
    assert after[-1].public.hex() in made.stdout
