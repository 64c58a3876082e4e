"""The search for secrets finds what it is there to find."""

import base64
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.plain_scan import WINDOW, PlainScan

PHOTO = np.random.default_rng(1).bytes(20_000)
NOISE = np.random.default_rng(2).bytes(50_000)
NAME = "Zsófia Quillfeather"
SCAN = PlainScan({"photo": PHOTO}, {"name": NAME})


def names(haystack: bytes) -> set[str]:
    return {finding.secret for finding in SCAN.within(haystack, "here")}


def test_noise_holds_no_secret() -> None:
    assert names(NOISE) == set()
    assert names(b"") == names(b"abc") == set()
    assert names(bytes(10_000)) == set()


@given(st.integers(0, len(PHOTO) - WINDOW), st.integers(0, 4000))
def test_any_window_of_a_photo_is_found_wherever_it_lies(start: int, at: int) -> None:
    planted = NOISE[:at] + PHOTO[start : start + WINDOW] + NOISE[at : at + 500]
    assert "photo" in names(planted)


@given(st.integers(0, 2000), st.integers(120, 400), st.integers(0, 50))
def test_a_part_in_base64_or_hexadecimal_is_found(start: int, length: int, at: int) -> None:
    part = PHOTO[start : start + length]
    assert names(NOISE[:at] + base64.b64encode(part) + b" ")
    assert names(NOISE[:at] + part.hex().encode())


@pytest.mark.parametrize(
    "form",
    [
        NAME.encode(), NAME.upper().encode(), NAME.encode("utf-16-le"), b'{"n": "Zs\\u00f3fia Quillfeather"}',
        base64.b64encode(f"xy{NAME}, and more".encode()), f"x{NAME}".encode().hex().encode(),
    ],
)  # fmt: skip
def test_a_name_is_found_in_the_forms_that_programs_use(form: bytes) -> None:
    assert names(NOISE[:777] + form + NOISE[:77])


def test_a_secret_in_a_file_or_in_its_name_is_found_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(NOISE)
    assert SCAN.files(tmp_path) == []
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "leak").write_bytes(NOISE[:100] + PHOTO[50:150])
    (tmp_path / f"{NAME}.jpg").write_bytes(b"")
    found = SCAN.files(tmp_path)
    assert {finding.secret for finding in found} == {"photo", "name"}
    assert any(finding.place.endswith("deep/leak") and 90 <= finding.offset <= 120 for finding in found)
