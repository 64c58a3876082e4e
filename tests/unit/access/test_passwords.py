"""Passwords: their length, their spelling, and that an unknown user costs what a known one does."""

import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.access.callers import new_secret, secret_digest
from app.access.passwords import _common_passwords, check_password, hash_password, password_matches
from app.domain.callers import username_key
from app.errors import Validation


@pytest.mark.parametrize("length", [0, 1, 7, 257, 1000, 1_000_000])
def test_h57_a_password_of_another_length_is_refused_before_any_hashing(length: int) -> None:
    started = time.perf_counter()
    with pytest.raises(Validation):
        check_password("x" * length, refuse_common=True)
    assert time.perf_counter() - started < 0.05


@pytest.mark.parametrize(
    "password", ["x" * 8, "x" * 71, "x" * 72, "x" * 73, "x" * 256, "nul\0inside", "\N{GRINNING FACE}" * 8]
)
def test_h57_every_character_of_a_password_counts(password: str) -> None:
    check_password(password, refuse_common=True)
    hashed = hash_password(password)
    assert password_matches(password, hashed)
    assert not password_matches(password[:-1] + "y", hashed)


@pytest.mark.parametrize("password", ["password", "PASSWORD", "12345678", "qwertyuiop", "iloveyou"])
def test_a_password_that_everybody_tries_is_refused_in_production_and_not_in_development(password: str) -> None:
    with pytest.raises(Validation) as refused:
        check_password(password, refuse_common=True)
    assert [advice.code for advice in refused.value.errors] == ["common"]
    check_password(password, refuse_common=False)


def test_the_list_of_what_everybody_tries_is_long_enough() -> None:
    assert len(_common_passwords()) >= 3000  # ASVS 5.0, 6.2.4


def test_a_hash_names_argon2id_and_its_costs() -> None:
    assert hash_password("correct horse").startswith("$argon2id$v=19$m=65536,t=3,p=4$")


def test_two_hashes_of_one_password_differ() -> None:
    assert hash_password("correct horse") != hash_password("correct horse")


def test_a_password_typed_on_another_keyboard_is_the_same() -> None:
    assert password_matches(
        unicodedata.normalize("NFD", "Grüße an Zoë"), hash_password(unicodedata.normalize("NFC", "Grüße an Zoë"))
    )


def test_h57_half_a_surrogate_pair_is_a_wrong_password_and_no_fault() -> None:
    assert not password_matches("\ud800correct horse", hash_password("correct horse"))


def test_an_unknown_user_is_never_let_in_and_costs_as_much() -> None:
    hashed = hash_password("correct horse")
    password_matches("warming up", None)

    def seconds(stored: str | None) -> float:
        started = time.process_time()
        assert not password_matches("wrong horse", stored)
        return time.process_time() - started

    known, unknown = min(seconds(hashed) for _ in range(3)), min(seconds(None) for _ in range(3))
    assert 0.5 < unknown / known < 2


def test_h57_an_overlong_password_costs_nothing() -> None:
    started = time.perf_counter()
    assert not password_matches("x" * 1_000_000, None)
    assert time.perf_counter() - started < 0.05


def test_secrets_have_256_bits_and_differ() -> None:
    first, second = new_secret(), new_secret()
    assert first != second
    assert len(first) == 43
    assert secret_digest(first) != secret_digest(second)
    assert len(secret_digest(first)) == 32


@given(st.text(max_size=64))
def test_a_username_is_compared_the_same_way_twice(username: str) -> None:
    key = username_key(username)
    assert username_key(key) == key


@pytest.mark.parametrize(
    ("one", "other"), [("Ann", "aNN"), ("Straße", "STRASSE"), ("\N{FULLWIDTH LATIN CAPITAL LETTER A}nn", "ann")]
)
def test_case_and_width_do_not_make_another_user(one: str, other: str) -> None:
    assert username_key(one) == username_key(other)


FIRST_USES = """
from concurrent.futures import ThreadPoolExecutor
from app.access.passwords import hash_password, password_matches
assert not password_matches("a guess", None)
with ThreadPoolExecutor(4) as threads:
    assert len({*threads.map(hash_password, ["correct horse"] * 4)}) == 4
"""


def test_the_first_guess_at_an_unknown_user_is_answered_as_every_other() -> None:
    subprocess.run([sys.executable, "-c", FIRST_USES], check=True, cwd=Path(__file__).parents[3])
