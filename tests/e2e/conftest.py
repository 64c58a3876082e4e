"""One running stack for all end-to-end tests; what they enrol, they keep apart by galleries of their own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.builders import Service, new_gallery, open_service
from tests.support.stacks import RunningStack, running_stack


@pytest.fixture(scope="session")
def stack_environment(model_dir: Path) -> dict[str, str]:
    """The settings of every stack in these tests: the real weights where they are, else dlib's."""
    return dict(os.environ) | {"MODEL_DIR": str(model_dir)}


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, stack_environment: dict[str, str]) -> Iterator[RunningStack]:
    """`idem up --no-demo` with two API processes, on a fresh store."""
    folder = tmp_path_factory.mktemp("stack") / "data"
    with running_stack(folder, "--no-demo", "--api-workers", "2", environment=stack_environment) as running:
        yield running


@pytest.fixture(scope="session")
def service(stack: RunningStack) -> Iterator[Service]:
    """The stack over HTTP, with a client for each role."""
    with open_service(stack.ready) as opened:
        yield opened


@pytest.fixture
def gallery(service: Service) -> str:
    """A gallery that nobody else uses."""
    return new_gallery(service)
