"""The documents' read questions on a real MongoDB; the same as in the unit tests."""

import pytest

from app.documents.galleries import Gallery
from app.documents.identities import Identity, ReferenceHashes
from app.runtime import Runtime
from tests.unit.documents.questions import *  # noqa: F403 - the tests are what is imported


@pytest.fixture
async def store(runtime: Runtime) -> None:
    """An empty database."""
    await Gallery.get_pymongo_collection().delete_many({})


async def test_a_reference_and_a_tag_are_found_by_their_indexes_and_not_by_looking_at_everybody(store: None) -> None:
    people = Identity.get_pymongo_collection()
    everybody = [
        {
            "_id": str(i),
            "gallery_id": "g",
            "status": "active",
            "external_ref_hash": bytes([i]),
            "name_tags": [bytes([i])],
        }
        for i in range(50)
    ]
    await people.insert_many(everybody)
    holding = Identity.holding({"g": ReferenceHashes(equal=bytes([7]), exact=bytes([8]))})
    tagged = {"gallery_id": {"$in": ["g"]}, "status": {"$ne": "erased"}, "name_tags": {"$in": [bytes([7])]}}
    for asked, examined in ((holding, 2), (tagged, 1)):
        plan = await people.find(asked).explain()
        assert plan["executionStats"]["totalDocsExamined"] == examined, asked
