"""Photos as phones and passports write them, over HTTP."""

import io

import pytest
from PIL import Image

from tests.e2e.builders import Service, enrol, opened, part, people
from tests.support.picture_files import heif_file, jpeg2000_file

SAME = 0.98
FILES = {
    "heic": lambda picture: heif_file(picture, quality=95),
    "heic of tiles": lambda picture: heif_file(picture, quality=95, tile_size=64),
    "avif": lambda picture: heif_file(picture, "AVIF", quality=95),
    "jpeg2000": jpeg2000_file,
    "codestream": lambda picture: jpeg2000_file(picture, no_jp2=True),
}


@pytest.mark.parametrize("kind", FILES)
def test_g1_g2_a_photo_in_another_format_is_the_same_photo(service: Service, kind: str) -> None:
    photo = people()[2].photo
    files = [part(photo, "photo_a"), part(FILES[kind](opened(photo)), "photo_b")]
    answer = service.officer.post("/v1/comparisons", files=files)
    assert answer.status_code == 200, answer.text
    assert answer.json()["match"]
    assert answer.json()["score"] >= SAME


def test_g1_an_enrolled_heic_is_kept_as_our_own_jpeg(service: Service, gallery: str) -> None:
    made = enrol(service, gallery, heif_file(opened(people()[3].photo), quality=95))
    path = f"/v1/identities/{made['id']}/samples/{made['samples'][0]['id']}/photo"
    answer = service.officer.get(path)
    assert answer.status_code == 200, answer.text
    with Image.open(io.BytesIO(answer.content)) as kept:
        assert kept.format == "JPEG"
        assert kept.size == opened(people()[3].photo).size
