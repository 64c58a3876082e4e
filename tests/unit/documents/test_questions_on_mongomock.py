"""The documents' read questions where no server can run; the same on mongod in the integration tests."""

from tests.unit.documents.questions import *  # noqa: F403 - the tests are what is imported
