"""What can be said of infra/compose.yaml and its images without a container engine."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from ml.settings import REPOSITORY_ROOT, TELEMETRY_OFF, Settings
from services import prefect_server, worker
from services.object_store import find_binary

COMPOSE = REPOSITORY_ROOT / "infra" / "compose.yaml"
DOCKERFILES = sorted((REPOSITORY_ROOT / "infra" / "containers").glob("*.Dockerfile"))
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|SIGNING|DATABASE_CONNECTION_URL")
REQUIRED = re.compile(r"\$\{[A-Z0-9_]+:\?[^}]{20,}\}")


@pytest.fixture(scope="module")
def services() -> dict[str, dict]:
    return yaml.safe_load(COMPOSE.read_text())["services"]


def environments(services: dict[str, dict]) -> list[tuple[str, str, str]]:
    return [(service, name, value) for service, fields in services.items() for name, value in fields["environment"].items()]


def test_all_parts_are_there(services: dict[str, dict]):
    parts = {"postgres", "object-store", "prefect-server", "registration", "worker", "predictor", "event-bridge"}
    assert set(services) == parts


def test_every_setting_of_ours_exists(services: dict[str, dict]):
    prefix = "MILLSTREAM_"
    named = {name.removeprefix(prefix).lower() for _, name, _ in environments(services) if name.startswith(prefix)}
    assert named
    assert named <= set(Settings.model_fields)


def test_every_setting_of_prefect_exists(services: dict[str, dict]):
    from prefect.settings import Settings as PrefectSettings
    from prefect.settings.legacy import _get_valid_setting_names

    known = _get_valid_setting_names(PrefectSettings)
    named = {name for _, name, _ in environments(services)} | set(prefect_server.ENVIRONMENT)
    assert {name for name in named if name.startswith("PREFECT_")} <= known


def test_parts_have_the_settings_of_the_local_stack(services: dict[str, dict]):
    assert prefect_server.ENVIRONMENT.items() <= services["prefect-server"]["environment"].items()
    assert worker.ENVIRONMENT.items() <= services["worker"]["environment"].items()


def test_telemetry_is_off_everywhere(services: dict[str, dict]):
    for name, fields in services.items():
        if fields["image"] == "millstream:local":
            assert TELEMETRY_OFF.items() <= fields["environment"].items(), name
    assert "-master.telemetry=false" in services["object-store"]["command"]
    image = (REPOSITORY_ROOT / "infra/containers/millstream.Dockerfile").read_text()
    assert all(f"{name}={value}" in image for name, value in TELEMETRY_OFF.items())


def test_secrets_come_from_outside_and_have_no_default(services: dict[str, dict]):
    secrets = [(service, name, value) for service, name, value in environments(services) if SECRET_NAME.search(name)]
    assert len(secrets) > 10
    for service, name, value in secrets:
        rest, required = REQUIRED.sub("", value), REQUIRED.findall(value)
        assert required, f"{service}: {name} has a value of its own, or no word on what to set it to"
        assert rest in ("", "postgresql+asyncpg://prefect:@postgres:5432/prefect"), f"{service}: {name} has a part that is written out"
    for service, name, value in environments(services):
        assert "${" not in value or not SECRET_NAME.search(value) or SECRET_NAME.search(name), f"{service}: {name} shows a secret"


def test_every_command_exists(services: dict[str, dict]):
    for name, fields in services.items():
        command = fields.get("command", [])
        if command[:2] == ["python", "-m"]:
            spec = importlib.util.find_spec(command[2])
            assert spec is not None, f"{name}: there is no module {command[2]}"
            if spec.submodule_search_locations:
                assert importlib.util.find_spec(f"{command[2]}.__main__") is not None, f"{name}: {command[2]} cannot be run"


def test_the_options_of_our_modules_exist(services: dict[str, dict]):
    for name in ("predictor", "event-bridge"):
        command = services[name]["command"]
        shown = subprocess.run([sys.executable, "-m", command[2], "--help"], capture_output=True, text=True, check=True).stdout
        assert all(option in shown for option in command if option.startswith("--")), name


def test_the_options_of_prefect_exist(services: dict[str, dict]):
    for options, command in (
        (services["worker"]["command"][3:], ["worker", "start"]),
        (services["prefect-server"]["command"][2].split("exec prefect server start")[1].split(), ["server", "start"]),
    ):
        shown = subprocess.run([sys.executable, "-m", "prefect", *command, "--help"], capture_output=True, text=True, check=True).stdout
        assert all(option in shown for option in options if option.startswith("--")), command
    assert services["worker"]["command"][:3] == ["prefect", "worker", "start"]
    assert services["worker"]["command"][4] == worker.WORK_POOL


def test_the_options_of_the_object_store_exist(services: dict[str, dict]):
    command = services["object-store"]["command"]
    assert command[0] == "weed" and command[2] == "mini"
    shown = subprocess.run([find_binary(), "help", "mini"], capture_output=True, text=True, check=False)
    known = set(re.findall(r"^  (-[\w.]+)", shown.stdout + shown.stderr, re.MULTILINE))
    assert len(known) > 50
    assert {option.partition("=")[0] for option in command[3:]} <= known


def test_ports_are_published_on_loopback_only(services: dict[str, dict]):
    published = {name: fields["ports"] for name, fields in services.items() if "ports" in fields}
    assert set(published) == {"object-store", "prefect-server", "predictor", "event-bridge"}
    for name, ports in published.items():
        assert all(re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z0-9_]+:-\d+\}:\d+", port) for port in ports), name


def test_every_part_is_watched_limited_and_started_again(services: dict[str, dict]):
    for name, fields in services.items():
        one_shot = name == "registration"
        assert fields["restart"] == ("on-failure:5" if one_shot else "unless-stopped"), name
        assert one_shot or fields["healthcheck"]["test"][0] == "CMD", name
        assert set(fields["deploy"]["resources"]["limits"]) == {"cpus", "memory"}, name
        assert "no-new-privileges:true" in fields["security_opt"] and "privileged" not in fields, name


def test_a_part_waits_only_for_what_can_say_that_it_is_ready(services: dict[str, dict]):
    for name, fields in services.items():
        for needed, how in fields.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[needed], f"{name} waits for the health of {needed}, which has no check"
            else:
                assert (needed, how["condition"]) == ("registration", "service_completed_successfully"), name


def test_volumes_and_networks_are_declared_and_used(services: dict[str, dict]):
    document = yaml.safe_load(COMPOSE.read_text())
    mounted = {volume.partition(":")[0] for fields in services.values() for volume in fields.get("volumes", [])}
    assert mounted == set(document["volumes"])
    assert {network for fields in services.values() for network in fields["networks"]} == set(document["networks"])
    assert services["postgres"]["networks"] == ["database"]
    assert document["networks"]["database"] == {"internal": True}


def test_images_are_built_here_or_have_an_exact_version(services: dict[str, dict]):
    for name, fields in services.items():
        if build := fields.get("build"):
            assert (COMPOSE.parent / build["context"] / build["dockerfile"]).is_file(), name
        else:
            assert re.fullmatch(r"[a-z/]+:\d+\.\d+[-a-z]*(@sha256:[0-9a-f]{64})?", fields["image"]), name


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_copies_what_is_there_and_runs_as_nobody_special(path: Path):
    text = path.read_text().replace("\\\n", " ")
    ignored = path.with_name(path.name + ".dockerignore").read_text().split()
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY") and "--from=" not in line]
    assert copied
    for source in (source for line in copied for source in line):
        assert (REPOSITORY_ROOT / source).exists(), source
        assert f"!{source}" in ignored, f"{source} is not sent to the builder"
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE)[-1] == "10001"
    assert not re.search(r"^ADD|:latest|^FROM (?!\$\{BASE\})", text, re.MULTILINE)
    for command in re.findall(r"pip install (.*?)(?:&&|$)", text, re.MULTILINE):
        allowed = "--require-hashes" in command or "torch==" in command or "--editable ." in command
        assert allowed, f"{path.name}: something is installed without hashes: {command}"


def test_the_image_has_the_torch_of_the_project():
    pinned = re.search(r'"(torch==[^"]+)"', (REPOSITORY_ROOT / "pyproject.toml").read_text())
    assert pinned and f" {pinned[1]}\n" in (REPOSITORY_ROOT / "infra/containers/millstream.Dockerfile").read_text()


def test_every_package_of_ours_is_in_the_image():
    packages = tomllib.loads((REPOSITORY_ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    image = (REPOSITORY_ROOT / "infra/containers/millstream.Dockerfile").read_text()
    assert all(f"COPY {package} {package}\n" in image for package in packages)
