"""The compose files: of the form that the specification gives, and closed to the outside but for nginx."""

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml

from app.config import Settings

Tree = Mapping[str, object]

REPOSITORY = Path(__file__).parents[3]
MAIN, GPU = "docker-compose.yml", "docker-compose.gpu.yml"
SERVICES = ("nginx", "api", "worker", "models", "mongo", "redis", "photos")
VARIABLE = re.compile(r"(?<!\$)\$\{([A-Z_]+)(:\?|:-)?[^}]*\}")


def text(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def tree(name: str) -> Tree:
    loaded: Tree = yaml.safe_load(text(name))
    return loaded


def part(of: Tree, *path: str) -> Tree:
    """The mapping at the end of a path of keys."""
    found: object = of
    for key in path:
        assert isinstance(found, Mapping), f"{key} of {path}"
        found = found[key]
    assert isinstance(found, Mapping), path
    return found


def items(of: Tree, key: str) -> Sequence[object]:
    """The list under a key; an empty one where there is none."""
    found = of.get(key, [])
    assert isinstance(found, Sequence)
    assert not isinstance(found, str)
    return found


@pytest.fixture(scope="module")
def compose() -> Tree:
    return tree(MAIN)


@pytest.mark.parametrize("name", [MAIN, GPU])
def test_a_compose_file_is_of_the_form_that_the_specification_gives(name: str) -> None:
    checker = Path(sys.executable).parent / "check-jsonschema"
    done = subprocess.run(
        [checker, "--builtin-schema", "vendor.compose-spec", REPOSITORY / name],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_the_parts_of_the_design_are_there(compose: Tree) -> None:
    assert tuple(part(compose, "services")) == SERVICES
    assert set(part(tree(GPU), "services")) <= set(SERVICES)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_can_do_no_more_than_it_must(compose: Tree, name: str) -> None:
    service = part(compose, "services", name)
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_only_nginx_is_reached_from_outside(compose: Tree) -> None:
    services = part(compose, "services")
    assert [name for name in services if "ports" in part(services, name)] == ["nginx"]
    assert not [name for name in services if "network_mode" in part(services, name)]
    assert part(compose, "networks", "back")["internal"] is True
    for name in ("mongo", "redis", "photos", "worker"):
        assert items(part(services, name), "networks") == ["back"]


@pytest.mark.parametrize("name", [MAIN, GPU])
def test_no_secret_has_a_default(name: str) -> None:
    secrets = [
        (variable, operator)
        for variable, operator in VARIABLE.findall(text(name))
        if re.search(r"PASSWORD|SECRET|_KEY$", variable)
    ]
    assert all(operator == ":?" for _, operator in secrets), secrets
    assert bool(secrets) == (name == MAIN)


def test_every_variable_stands_in_the_example() -> None:
    told = set(re.findall(r"^#?([A-Z][A-Z0-9_]*)=", text(".env.example"), re.MULTILINE))
    required = {name for name, operator in VARIABLE.findall(text(MAIN)) if operator == ":?"}
    assert {name for name, _ in VARIABLE.findall(text(MAIN) + text(GPU))} <= told
    to_fill_in = text(".env.example").split("# --- Only for docker compose")[1]
    assert set(re.findall(r"^([A-Z][A-Z0-9_]*)=$", to_fill_in, re.MULTILINE)) == required


@pytest.mark.parametrize("name", ["api", "worker"])
def test_the_product_is_given_only_settings_that_it_knows(compose: Tree, name: str) -> None:
    environment = part(compose, "services", name, "environment")
    assert {variable.lower() for variable in environment} <= set(Settings.model_fields)


def test_the_product_starts_in_production_with_what_compose_gives_it(
    compose: Tree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    secret = "3f9a1c7e5b2d8064" * 4  # as `openssl rand -hex 32` gives it
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in part(compose, "services", "api", "environment").items():
        filled = VARIABLE.sub(
            lambda found: secret if found[2] == ":?" else found[0].partition(":-")[2].rstrip("}"), str(value)
        )
        monkeypatch.setenv(name, filled)
    assert Settings().is_production


@pytest.mark.parametrize("name", ["api", "worker"])
def test_the_product_waits_until_its_stores_are_healthy(compose: Tree, name: str) -> None:
    waits_for = part(compose, "services", name, "depends_on")
    assert waits_for == {store: {"condition": "service_healthy"} for store in ("mongo", "redis", "photos")}
    for store in waits_for:
        assert "test" in part(compose, "services", store, "healthcheck")


@pytest.mark.parametrize("name", ["nginx", "mongo", "redis", "photos"])
def test_an_image_is_pinned_to_a_version(compose: Tree, name: str) -> None:
    _, _, tag = str(part(compose, "services", name)["image"]).partition(":")
    assert re.search(r"\d+\.\d+|RELEASE\.\d{4}", tag), tag


def test_a_full_queue_refuses_rather_than_forgets(compose: Tree) -> None:
    command = " ".join(str(word) for word in items(part(compose, "services", "redis"), "command"))
    assert "--maxmemory-policy noeviction" in command
    assert "--appendonly yes" in command
    assert "--requirepass" in command


def test_every_volume_and_file_that_is_mounted_exists(compose: Tree) -> None:
    volumes = set(part(compose, "volumes"))
    for name in SERVICES:
        for mount in items(part(compose, "services", name), "volumes"):
            source = str(mount).split(":", maxsplit=1)[0]
            assert source in volumes or (REPOSITORY / source).exists(), mount


@pytest.mark.parametrize("name", ["api", "worker"])
def test_with_a_gpu_the_product_is_built_for_it_and_is_given_one(name: str) -> None:
    service = part(tree(GPU), "services", name)
    assert part(service, "build")["target"] == "gpu"
    (device,) = items(part(service, "deploy", "resources", "reservations"), "devices")
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
