"""The demo's photos."""

import io
from pathlib import Path

import pytest
from PIL import Image

from app.devstack.demo import DemoFailed, people_in, sample_people, second_capture


def test_the_sample_photos_come_with_the_dependencies() -> None:
    people = sample_people()
    assert len({person.name for person in people}) == 7
    for person in people:
        with Image.open(io.BytesIO(person.photo)) as photo, Image.open(io.BytesIO(person.selfie)) as selfie:
            assert min(photo.size) >= 480
            assert selfie.size < photo.size
        assert person.photo != person.selfie


def photo(path: Path, colour: str) -> None:
    """A plain photo file."""
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64), colour).save(path)


def test_the_first_photo_of_a_folder_enrols_and_the_second_comes_back(tmp_path: Path) -> None:
    photo(tmp_path / "ann" / "1.png", "red")
    photo(tmp_path / "ann" / "2.png", "green")
    photo(tmp_path / "bob" / "1.png", "blue")
    ann, bob = people_in(tmp_path)
    assert (ann.name, ann.photo) == ("ann", (tmp_path / "ann" / "1.png").read_bytes())
    assert ann.selfie == (tmp_path / "ann" / "2.png").read_bytes()
    with Image.open(tmp_path / "bob" / "1.png") as only:
        assert bob.selfie == second_capture(only)


@pytest.mark.parametrize("people", [0, 1])
def test_one_person_is_too_few(tmp_path: Path, people: int) -> None:
    if people:
        photo(tmp_path / "ann" / "1.png", "red")
    with pytest.raises(DemoFailed, match="two sub-folders"):
        people_in(tmp_path)


def test_a_file_that_is_no_photo_is_named(tmp_path: Path) -> None:
    photo(tmp_path / "ann" / "1.png", "red")
    (tmp_path / "bob").mkdir()
    (tmp_path / "bob" / "1.jpg").write_bytes(b"not a photo")
    with pytest.raises(DemoFailed, match=r"1\.jpg"):
        people_in(tmp_path)
