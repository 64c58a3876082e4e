"""Names and references of ten scripts, as people write and type them."""

import base64

import httpx
import pytest

from tests.builders import portrait
from tests.integration.test_renewed_lookups import claim, enrol, listed
from tests.integration.test_subject_access import named

#: Script; a name as it is enrolled; how people type it, or a part of it; what finds others.
NAMES = [
    ("Thai", "สมชาย ใจดี", ["สมชาย", "ใจดี", "ชาย", "สมชายใจดี", "สมชาย\u200bใจดี"], ["สมหญิง", "ใจดำ"]),
    ("Thai", "น้ำฝน ศรีสุข", ["นํ้าฝน", "น้ำ", "ศรี", "สุข"], ["น้ำตก"]),
    ("Arabic", "أحمد مُصطفى", ["احمد", "أحمد", "مصطفي", "مصطفى", "احـمد", "احمد مصطفى"], ["محمد"]),
    ("Arabic", "فاطمة الزهراء", ["فاطمه", "فاطمة", "الزهراء"], ["زينب"]),
    ("Persian", "علی\u200cرضا حسینی", ["علي رضا", "علیرضا", "علی\u200cرضا", "رضا", "حسيني"], ["حسن"]),
    ("Persian", "کیان یزدانی", ["كيان", "يزداني", "کیان یزدانی"], ["کاوه"]),
    ("Khmer", "សុខ\u200bសាន្ត", ["សុខសាន្ត", "សុខ", "សាន្ត", "សុខ សាន្ត"], ["ភក្ដី"]),
    ("Khmer", "ចាន់ ដារ៉ា", ["ចាន់", "ដារ៉ា", "ចាន់ដារ៉ា"], ["សុខ"]),
    ("Chinese", "王小明", ["王", "小明", "明", "王小"], ["大明", "小王"]),
    ("Chinese", "\U00031350某", ["某", "\U00031350"], ["王"]),
    ("Japanese", "髙橋 ヒロシ", ["高橋", "髙橋", "ひろし", "ﾋﾛｼ", "橋"], ["石橋", "ヒロミ"]),
    ("Japanese", "葛\U000e0100城 ガク", ["葛城", "葛\U000e0101城", "がく", "ｶﾞｸ"], ["カク"]),
    ("Vietnamese", "Nguyễn Thị Ánh Đào", ["nguyen", "NGUYỄN", "dao", "đào", "thi anh", "Nguyê\u0303n"], ["Tran"]),
    ("Vietnamese", "Trần Văn Đức", ["tran van duc", "duc", "Trâ\u0300n"], ["Nguyen"]),
    ("Turkish", "İpek Işık", ["ipek", "İPEK", "ısık", "isik", "IŞIK", "işik"], ["Kiraz"]),
    ("Turkish", "Gülşah Yıldız", ["gulsah", "yildiz", "YILDIZ", "GÜLŞAH"], ["yilmaz"]),
    ("Spanish", "José Muñoz García", ["jose", "munoz", "garcia", "MUÑOZ", "jose munoz"], ["Maria"]),
    ("Spanish", "María de la O Núñez", ["maria", "nunez", "de la o", "delao"], ["Marta"]),
    ("Irish", "Conan O\u2019Brien", ["o'brien", "o\u2019brien", "OBrien", "brien", "O Brien"], ["O'Neill"]),
    ("Irish", "Seán Ó Súilleabháin", ["sean o suilleabhain", "suilleabhain", "Ó Súill", "ósúill"], ["Séamus"]),
]

#: Script; a reference as it is enrolled; spellings of the same one; others.
REFERENCES = [
    ("Thai", "กท-๑๒๓๔", ["กท-1234", "กท\u2011๑๒๓๔", " กท-๑๒๓๔ "], ["กข-๑๒๓๔", "กท-๑๒๓๕"]),
    ("Thai", "1-1001-00123-45-6", ["๑-๑๐๐๑-๐๐๑๒๓-๔๕-๖", "1\u20131001\u201300123\u201345\u20136"], ["1100100123456"]),
    ("Arabic", "ب-١٣٥", ["ب-135", "ب\u2212١٣٥", "\u200fب-١٣٥"], ["ت-١٣٥"]),
    ("Arabic", "رقم ١٢", ["رقم 12", "رقم  ١٢", "رقم\u00a0۱۲"], ["رقم ٢١"]),
    ("Persian", "کد ۱۲\u200c۳", ["کد ۱۲۳", "کد 123"], ["کد ۱۲۴"]),
    ("Persian", "۰۰۱-۲", ["001-2", "٠٠١-٢"], ["1-2"]),
    ("Khmer", "ភព-១២", ["ភព-12", "ភព\u200b-១២"], ["ភព-១៣"]),
    ("Khmer", "០១២ ៣៤", ["012 34", "០១២\u2009៣៤"], ["01234"]),
    ("Chinese", "京Ａ－１２３", ["京a-123", "京A\u2013123"], ["津A-123"]),
    ("Chinese", "\U000323b0字第７号", ["\U000323b0字第7号"], ["\U000323b1字第7号"]),
    ("Japanese", "免許ｱ-１２", ["免許ア-12", "免許ア\u201112"], ["免許イ-12"]),
    ("Japanese", "葛\U000e0100－９", ["葛-9", "葛\ufe00-9"], ["葛-8"]),
    ("Vietnamese", "Đ-0079", ["đ-0079", "Đ\u20100079"], ["D-0079"]),
    ("Vietnamese", "HỘ CHIẾU 7", ["hộ chiếu 7", "hô\u0323 chiê\u0301u 7"], ["ho chieu 7"]),
    ("Turkish", "ış-34", ["ış\u201334", "ış\u00ad-34"], ["iş-34"]),
    ("Turkish", "TC 10000000146", ["tc 10000000146", "TC\u200310000000146"], ["TC 10000000147"]),
    ("Spanish", "ÑU-12345678-Z", ["ñu-12345678-z", "N\u0303U\u201412345678\u2014Z"], ["NU-12345678-Z"]),
    ("Spanish", "Nº 77", ["no 77", "nº  77"], ["Nº 78"]),
    ("Irish", "É-9", ["e\u0301-9", "é\u20159", "É-\u20609"], ["E-9"]),
    ("Irish", "PPS 1234567T", ["pps 1234567t", "\ufeffPPS 1234567T"], ["PPS1234567T"]),
]


SCRIPTS = sorted({script for script, *_ in NAMES})


@pytest.mark.parametrize("script", SCRIPTS)
async def test_g5_a_name_is_found_as_people_type_it(officer: httpx.AsyncClient, script: str) -> None:
    table = [row for row in NAMES if row[0] == script]
    shown = [(await enrol(officer, kept, full_name=kept)).json()["full_name"] for _, kept, _, _ in table]
    for own, (_, _, typed, others) in zip(shown, table, strict=True):
        for asked in typed:
            assert own in await named(officer, asked), asked
        for asked in others:
            assert own not in await named(officer, asked), asked


@pytest.mark.parametrize("script", SCRIPTS)
async def test_g6_a_reference_is_one_in_all_its_spellings_and_two_are_two(
    officer: httpx.AsyncClient, script: str
) -> None:
    for _, kept, same, others in [row for row in REFERENCES if row[0] == script]:
        first = await enrol(officer, kept, external_ref=kept)
        assert first.status_code == 202, first.text
        assert await claim(officer, same[0], kept) == 200
        for spelling in same:
            assert await listed(officer, spelling) == [first.json()["id"]], spelling
            assert (await enrol(officer, "other", external_ref=spelling)).status_code == 409, spelling
        for other in others:
            assert await listed(officer, other) == [], other
            assert (await enrol(officer, other, external_ref=other)).status_code == 202, other


async def test_f4_what_cannot_be_seen_makes_no_second_reference(officer: httpx.AsyncClient) -> None:
    bob = (await enrol(officer, "bob", external_ref="NID-bob")).json()["id"]
    for one, other in (
        ("NID-4", "NID-\u200c4"), ("NID-7", "NID-7\ufe0f"), ("NID-8", "NID-8\u3164"), ("NID-9", "NID-9 "),
    ):  # fmt: skip
        ann = await enrol(officer, one, external_ref=one)
        assert (await enrol(officer, "else", external_ref=other)).status_code == 409
        assert await listed(officer, other) == [ann.json()["id"]]
        assert await claim(officer, other, one) == 200
        assert (await officer.patch(f"/v1/identities/{bob}", json={"external_ref": other})).status_code == 409


async def test_f4_a_long_spelling_of_a_reference_is_found(officer: httpx.AsyncClient) -> None:
    reference = "\u1f82" * 128
    ann = await enrol(officer, "ann", external_ref=reference)
    assert ann.status_code == 202, ann.text
    apart = "\u03b1\u0313\u0300\u0345" * 128
    for spelling in (apart, " \u200b" * 500 + reference):
        assert await listed(officer, spelling) == [ann.json()["id"]]
        assert await claim(officer, spelling, "ann") == 200
    too_long = await officer.get("/v1/identities", params={"external_ref": "x" * 513})
    assert too_long.status_code == 422


UNSEEN = ("\u200d", "\u3164", "\u2800", "\u200b \ufe0f", "\U0001d159", "\u034f", "\u0301")
NO_TEXT = ("\u202eevil", "a\u202db", "a\nb", "a\u2028b", "a\ufffe", "\ufdd0", "a\ufff9b", "a\0b")


@pytest.mark.parametrize("field", ["full_name", "external_ref"])
async def test_f13_a_name_can_be_seen_and_is_text(officer: httpx.AsyncClient, field: str) -> None:
    ann = (await enrol(officer, "ann", **{field: "Ann"})).json()["id"]
    photo = base64.b64encode(portrait("ann")).decode()
    for name in (*UNSEEN, *NO_TEXT):
        assert (await officer.patch(f"/v1/identities/{ann}", json={field: name})).status_code == 422, ascii(name)
        refused = await officer.post("/v1/identities", json={field: name, "photo_base64": photo})
        assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, field), ascii(name)


async def test_g4_names_of_the_world_are_taken(officer: httpx.AsyncClient) -> None:
    for typed, kept in (
        ("\U00031350某", "\U00031350某"), ("\U0002ebf0", "\U0002ebf0"), ("\U000323b0", "\U000323b0"),
        ("\ue000山", "\ue000山"), ("សុខ\u200bសាន្ត", "សុខសាន្ត"), ("Smith\u200e", "Smith"), ("\u2068Smith\u2069", "Smith"),
        ("علی\u200cرضا", "علی\u200cرضا"), ("葛\U000e0100城", "葛\U000e0100城"), ("ᠮᠣᠩᠭᠣᠯ\u180e", "ᠮᠣᠩᠭᠣᠯ\u180e"),
        ("\ufeffAnn\u00ad", "Ann"), ("Ann\u061c", "Ann"), ("ሀ\U0001e030", "ሀ\U0001e030"), ("\u0600Ann", "\u0600Ann"),
    ):  # fmt: skip
        answer = await enrol(officer, "ann", full_name=typed)
        assert (answer.status_code, answer.json()["full_name"]) == (202, kept), ascii(typed)
