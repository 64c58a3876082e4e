"""The Kubernetes manifests: one story with the image, the settings and the API's own probes."""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from app.config import Settings

REPOSITORY = Path(__file__).parents[3]
DOCUMENTS = list(yaml.safe_load_all((REPOSITORY / "deploy/kubernetes.yaml").read_text(encoding="utf-8")))
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")


class Pod(NamedTuple):
    """A deployment's pod, and its only container."""

    spec: Mapping[str, object]
    container: Mapping[str, object]


def mapping(found: object) -> Mapping[str, object]:
    assert isinstance(found, Mapping)
    return found


def sequence(found: object) -> Sequence[object]:
    assert isinstance(found, list)
    return found


def the(kind: str, name: str) -> Mapping[str, object]:
    (found,) = [one for one in DOCUMENTS if one["kind"] == kind and one["metadata"]["name"] == name]
    return mapping(found)


def pod(name: str) -> Pod:
    spec = mapping(mapping(mapping(the("Deployment", name)["spec"])["template"])["spec"])
    (container,) = sequence(spec["containers"])
    return Pod(spec, mapping(container))


@pytest.mark.parametrize("name", ["idem-api", "idem-worker"])
def test_a_pod_meets_the_restricted_standard(name: str) -> None:
    spec, container = pod(name)
    security = mapping(spec["securityContext"])
    assert security["runAsNonRoot"] is True
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert re.search(rf"^USER {security['runAsUser']}:{security['runAsGroup']}$", DOCKERFILE, re.MULTILINE)
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@pytest.mark.parametrize("name", ["idem-api", "idem-worker"])
def test_volumes_lie_where_the_image_looks_for_them(name: str) -> None:
    spec, container = pod(name)
    mounted = {str(mapping(mount)["mountPath"]) for mount in sequence(container["volumeMounts"])}
    told = dict(re.findall(r"(VECTOR_DB_PATH|MODEL_DIR)=(\S+)", DOCKERFILE))
    assert set(told.values()) <= mounted
    for volume in sequence(spec["volumes"]):
        if claim := mapping(volume).get("persistentVolumeClaim"):
            claimed = mapping(the("PersistentVolumeClaim", str(mapping(claim)["claimName"]))["spec"])
            assert claimed["accessModes"] == ["ReadWriteMany"]


def test_the_api_is_asked_whether_it_lives_and_whether_it_is_ready() -> None:
    _, container = pod("idem-api")
    paths = {
        probe: mapping(mapping(container[probe])["httpGet"])["path"]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    assert paths == {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}
    assert f"API_PORT={mapping(sequence(container['ports'])[0])['containerPort']}" in DOCKERFILE


def test_only_known_settings_are_given_and_no_secret_stands_there() -> None:
    given = mapping(the("ConfigMap", "idem")["data"])
    assert {name.lower() for name in given} <= set(Settings.model_fields)
    assert not [name for name in given if re.search("PASSWORD|SECRET|_KEY$|URI$|URL$", name)]


def test_the_service_leads_to_the_api() -> None:
    labels = mapping(mapping(mapping(mapping(the("Deployment", "idem-api")["spec"])["template"])["metadata"])["labels"])
    assert mapping(the("Service", "idem")["spec"])["selector"] == labels


def test_one_address_at_most_is_believed_about_callers_until_somebody_fills_it_in() -> None:
    believed = ipaddress.ip_network(str(mapping(the("ConfigMap", "idem")["data"])["FORWARDED_ALLOW_IPS"]))
    assert believed.num_addresses == 1
    assert believed.subnet_of(ipaddress.ip_network("192.0.2.0/24"))  # RFC 5737: an example, and nobody's


@pytest.mark.parametrize(("component", "callers"), [("api", {"ingress-nginx", "prometheus"}), ("worker", set())])
def test_h108_only_named_pods_reach_a_pod(component: str, callers: set[str]) -> None:
    policy = mapping(the("NetworkPolicy", f"idem-{component}")["spec"])
    template = mapping(mapping(the("Deployment", f"idem-{component}")["spec"])["template"])
    assert policy["podSelector"] == {"matchLabels": mapping(template["metadata"])["labels"]}
    assert policy["policyTypes"] == ["Ingress"]
    let_in = set()
    for rule in map(mapping, sequence(policy.get("ingress", []))):
        assert rule["ports"] == [{"port": "http"}]
        for peer in map(mapping, sequence(rule["from"])):
            assert set(peer) == {"namespaceSelector", "podSelector"}, "a namespace as a whole is not a caller"
            assert mapping(peer["namespaceSelector"])["matchLabels"]
            let_in.add(mapping(mapping(peer["podSelector"])["matchLabels"])["app.kubernetes.io/name"])
    assert let_in == callers
