"""What can be said of infra/kubernetes without a cluster."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ml.errors import TrainingPreempted
from ml.settings import REPOSITORY_ROOT, Settings
from ml.training.command_line import read_spec
from ml.training.launcher import STOP_GRACE_SECONDS
from ml.training.nodes import JOIN_VARIABLE, check_nodes
from ml.training.uploads import FINISH_SECONDS

FOLDER = REPOSITORY_ROOT / "infra" / "kubernetes"
FILES = sorted(FOLDER.glob("*.yaml"))
# Read by the command line beside the settings.
OTHER_VARIABLES = {JOIN_VARIABLE, "HOME"}


def documents(name: str) -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all((FOLDER / name).read_text())}


def inner(node: object) -> Iterator[dict[str, Any]]:
    """Every mapping inside a document."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from inner(value)
    elif isinstance(node, list):
        for value in node:
            yield from inner(value)


def job() -> dict[str, Any]:
    return documents("indexed-job.yaml")["Job"]["spec"]


def runtime_job() -> dict[str, Any]:
    replicated = documents("trainjob.yaml")["ClusterTrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
    assert [one["name"] for one in replicated] == ["node"]
    return replicated[0]["template"]["spec"]


def pods() -> list[dict[str, Any]]:
    return [job()["template"]["spec"], runtime_job()["template"]["spec"]]


def trainer() -> dict[str, Any]:
    return documents("trainjob.yaml")["TrainJob"]["spec"]["trainer"]


def environments() -> list[list[dict[str, Any]]]:
    return [job()["template"]["spec"]["containers"][0]["env"], trainer()["env"]]


@pytest.fixture
def training_file(tmp_path: Path) -> Path:
    path = tmp_path / "training.yaml"
    path.write_text(documents("storage.yaml")["ConfigMap"]["data"]["training.yaml"])
    return path


def test_the_expected_objects_are_there():
    assert set(documents("storage.yaml")) == {"PersistentVolumeClaim", "ConfigMap"}
    assert set(documents("indexed-job.yaml")) == {"Service", "NetworkPolicy", "Job"}
    assert {kind: one["apiVersion"] for kind, one in documents("trainjob.yaml").items()} == {
        "ClusterTrainingRuntime": "trainer.kubeflow.org/v1alpha1",
        "TrainJob": "trainer.kubeflow.org/v1alpha1",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_secret_is_written_out(path: Path):
    for document in yaml.safe_load_all(path.read_text()):
        assert document["kind"] != "Secret"
        for node in inner(document):
            if re.search(r"KEY|SECRET|TOKEN|PASSWORD", str(node.get("name", ""))):
                assert set(node) == {"name", "valueFrom"} and set(node["valueFrom"]) == {"secretKeyRef"}, node


def test_every_variable_is_read_by_somebody():
    for environment in environments():
        names = {entry["name"] for entry in environment}
        assert {name for name in names if name.removeprefix("MILLSTREAM_").lower() in Settings.model_fields} | OTHER_VARIABLES >= names
        assert {"MILLSTREAM_S3_ACCESS_KEY", "MILLSTREAM_S3_SECRET_KEY", JOIN_VARIABLE} <= names
    assert environments()[0] == environments()[1]


def test_the_command_and_its_options_exist():
    shown = subprocess.run([sys.executable, "-m", "ml.training", "--help"], capture_output=True, text=True, check=True).stdout
    for command in (job()["template"]["spec"]["containers"][0]["command"], trainer()["command"]):
        assert command[:3] == ["python", "-m", "ml.training"]
        assert all(f"{option} " in shown for option in command if option.startswith("--"))
        mounted = [mount["mountPath"] for mount in job()["template"]["spec"]["containers"][0]["volumeMounts"]]
        assert str(Path(command[-1]).parent) in mounted


def test_the_training_file_is_accepted_on_each_machine(training_file: Path, monkeypatch: pytest.MonkeyPatch):
    # The object store is not asked for in this test.
    without_store = {"checkpoints.object_storage": False}
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    spec, _ = read_spec(training_file, without_store)
    check_nodes(spec)
    assert (spec.nodes.rank, spec.nodes.count) == (3, job()["completions"])
    assert job()["completions"] == job()["parallelism"]
    service, policy = documents("indexed-job.yaml")["Service"], documents("indexed-job.yaml")["NetworkPolicy"]
    name = documents("indexed-job.yaml")["Job"]["metadata"]["name"]
    assert spec.nodes.master_addr == f"{name}-0.{job()['template']['spec']['subdomain']}"
    assert job()["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["ports"][0]["port"] == spec.nodes.master_port
    assert service["spec"]["selector"] == policy["spec"]["podSelector"]["matchLabels"] == {"batch.kubernetes.io/job-name": name}
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]


def test_a_training_job_is_told_its_place_by_the_operator(training_file: Path, monkeypatch: pytest.MonkeyPatch):
    given = {"PET_NNODES": str(trainer()["numNodes"]), "PET_NODE_RANK": "2", "PET_MASTER_ADDR": "a-node-0-0.a", "PET_MASTER_PORT": "29401"}
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    spec, _ = read_spec(training_file, {"checkpoints.object_storage": False})
    check_nodes(spec)
    assert (spec.nodes.count, spec.nodes.rank) == (trainer()["numNodes"], 2)
    assert (spec.nodes.master_addr, spec.nodes.master_port) == ("a-node-0-0.a", 29401)
    assert spec.num_ranks == trainer()["numNodes"] * trainer()["numProcPerNode"]
    reference = documents("trainjob.yaml")["TrainJob"]["spec"]["runtimeRef"]
    found = documents("trainjob.yaml")["ClusterTrainingRuntime"]
    assert reference == {"apiGroup": "trainer.kubeflow.org", "kind": found["kind"], "name": found["metadata"]["name"]}
    assert found["spec"]["mlPolicy"]["torch"] == {}


def test_a_preempted_machine_is_not_a_failed_one_and_bad_input_is_not_tried_again():
    for spec in (job(), runtime_job()):
        rules = spec["podFailurePolicy"]["rules"]
        actions = {code: rule["action"] for rule in rules if "onExitCodes" in rule for code in rule["onExitCodes"]["values"]}
        assert actions == {TrainingPreempted.exit_code: "Ignore", 2: "FailJob"}
        assert rules[0]["onPodConditions"][0]["type"] == "DisruptionTarget" and rules[0]["action"] == "Ignore"
        names = {container["name"] for container in spec["template"]["spec"]["containers"]}
        assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == names
        # Kubernetes takes a failure policy with this only.
        assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert job()["completionMode"] == "Indexed" and job()["backoffLimitPerIndex"] > 0 and job()["maxFailedIndexes"] == 0


def test_ranks_have_the_time_to_save():
    for pod in pods():
        assert pod["terminationGracePeriodSeconds"] > STOP_GRACE_SECONDS + FINISH_SECONDS


def test_pods_run_without_rights():
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["readOnlyRootFilesystem"] is True and context["allowPrivilegeEscalation"] is False


def test_resources_are_bounded_and_alike():
    for resources in (job()["template"]["spec"]["containers"][0]["resources"], trainer()["resourcesPerNode"]):
        assert resources["requests"] == resources["limits"]
        assert {"cpu", "memory"} <= set(resources["limits"])


def test_volumes_are_declared_and_there(training_file: Path):
    made = {one["metadata"]["name"] for one in documents("storage.yaml").values()}
    assert documents("storage.yaml")["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods():
        declared = {volume["name"] for volume in pod["volumes"]}
        mounted = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert set(mounted) == declared
        for volume in pod["volumes"]:
            named = volume.get("persistentVolumeClaim", {}).get("claimName") or volume.get("configMap", {}).get("name")
            assert named is None or named in made
        assert read_spec(training_file, {"checkpoints.object_storage": False})[0].work_dir.is_relative_to(mounted["work"])


def test_the_image_is_that_of_the_compose_file():
    compose = yaml.safe_load((REPOSITORY_ROOT / "infra" / "compose.yaml").read_text())
    image = compose["services"]["worker"]["image"]
    images = [container["image"] for pod in pods() for container in pod["containers"]] + [trainer()["image"]]
    assert set(images) == {image}
    dockerfile = (REPOSITORY_ROOT / "infra" / "containers" / "millstream.Dockerfile").read_text()
    assert re.findall(r"^USER (.+)$", dockerfile, re.MULTILINE)[-1] == "10001"
