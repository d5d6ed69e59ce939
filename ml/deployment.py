"""Takes a version into service and proves that it answers, or puts everything back.

A version is written, asked in a fresh process, made champion, and asked again through the running predictor. Whatever
fails after the alias moved puts the alias back, so that the model that served before serves on.

`python -m ml.deployment BUNDLE_FOLDER` is the fresh process: requests come in as JSON lines, replies go out as JSON lines.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from ml.artifacts import Deployment
from ml.bundles import BUNDLE_FILE
from ml.errors import BundleError, DeploymentError
from ml.registry import ModelVersion, Registry
from ml.storage.artifacts import digest_file

if TYPE_CHECKING:
    import httpx

TOLERANCE = 1e-5
"""Largest difference between a number expected and a number served. The same graph in another batch differs by about 1e-7."""

HTTP_CHUNK_ITEMS = 64
HTTP_CHUNK_BYTES = 500_000
HTTP_TIMEOUT_SECONDS = 60
POLL_SECONDS = 0.2


def deploy(
    registry: Registry,
    version: ModelVersion,
    bundle_folder: Path,
    held_out: Sequence[tuple[dict, dict]],
    *,
    predictor_url: str | None,
    who: str,
    why: str,
    timeout_seconds: float = 120,
) -> Deployment:
    """Make a version the champion of its name, provided that it answers as it should.

    Args:
        version: not yet in the registry; `bundle_folder` holds its bundle, which is in the object store already.
        held_out: (request, expected reply) pairs; of a reply, only what is expected is compared (see `check_reply`).
        predictor_url: the running predictor, asked over HTTP; None when there is none to ask.
        timeout_seconds: for the fresh process, and again for the predictor.

    Returns:
        "deployed"; "unchanged" when the champion is this bundle already; "rejected" when the champion takes other
        requests or gives other replies; "failed" when an answer was wrong or missing, the alias then being where it was.

    Raises:
        BundleError: the folder does not hold the bundle that the version names.
        DeploymentError: a check failed and somebody else has moved the alias since, so that it was left alone.
        StorageError: the object store failed; the alias is put back if it had moved.
    """
    name = version.name
    before = registry.read_aliases(name)
    champion = registry.get_version(name, before.champion) if before.champion else None
    predict_url = predict_address(predictor_url, name) if predictor_url else None

    def outcome(status: str, *reasons: str, served: str | None, previous: str | None = before.champion) -> Deployment:
        return Deployment.model_validate(
            {
                "status": status,
                "name": name,
                "version": served,
                "previous_version": previous,
                "predict_url": predict_url,
                "reasons": reasons,
            }
        )

    if champion is not None and champion.schema_digest != version.schema_digest:
        return outcome("rejected", _other_schema(champion, version), served=None)
    if champion is not None and champion.bundle.digest == version.bundle.digest:
        try:
            if predictor_url:
                check_served(predictor_url, name, champion.version, held_out, timeout_seconds)
        except DeploymentError as error:
            return outcome("failed", f"the champion is this very model already, but it is not served: {error}", served=champion.version)
        return outcome(
            "unchanged", f"the champion {champion.version} is this very model already", served=champion.version, previous=before.previous
        )

    if digest_file(bundle_folder / BUNDLE_FILE) != version.bundle.digest:
        raise BundleError(f"{bundle_folder} is not the bundle of {name} {version.version}; fetch {version.bundle.digest[:8]} again")
    registry.add_version(version)
    registry.set_candidate(name, version.version, who, why)
    try:
        requests, expected = [pair[0] for pair in held_out], [pair[1] for pair in held_out]
        check_in_isolation(bundle_folder, requests, expected, timeout_seconds)
    except DeploymentError as error:
        registry.set_candidate(name, None, who, f"{version.version} failed its check: {error}")
        return outcome("failed", f"{version.version} was not promoted: {error}", served=None)

    registry.promote(name, version.version, who, why)
    try:
        if predictor_url:
            check_served(predictor_url, name, version.version, held_out, timeout_seconds)
    except DeploymentError as error:
        registry.withdraw(name, version.version, before, who, f"{version.version} failed its check: {error}")
        return outcome("failed", f"the alias is back at {before.champion or 'nothing'}: {error}", served=None)
    except BaseException as error:
        registry.withdraw(name, version.version, before, who, f"its check was broken off: {type(error).__name__}")
        raise
    asked = f"; {len(held_out)} held-out rows asked over HTTP equal the offline replies" if predictor_url else ""
    return outcome("deployed", f"{version.version} is champion{asked}", served=version.version)


def check_in_isolation(bundle_folder: Path, requests: Sequence[dict], expected: Sequence[dict], timeout_seconds: float = 120) -> None:
    """Load a bundle in a fresh Python process and ask it every request, one by one.

    Raises:
        DeploymentError: the process failed or took too long, or a reply is not the one expected; says which row and by how much.
    """
    lines = "".join(json.dumps(request, ensure_ascii=False) + "\n" for request in requests)
    command = [sys.executable, "-m", "ml.deployment", str(bundle_folder)]
    # One thread, as where it will be served; no settings of this process decide how the other one answers.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    try:
        finished = subprocess.run(command, input=lines.encode(), capture_output=True, env=environment, timeout=timeout_seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise DeploymentError(
            f"{bundle_folder}: a fresh process did not answer {len(requests)} requests in {timeout_seconds:g} s"
        ) from error
    if finished.returncode != 0:
        tail = "\n".join(finished.stderr.decode(errors="replace").splitlines()[-10:])
        raise DeploymentError(f"{bundle_folder}: a fresh process could not answer (exit status {finished.returncode}):\n{tail}")
    # Only "\n" ends a line here: a reply may hold other characters that str.splitlines() would split at.
    replies = [json.loads(line) for line in finished.stdout.decode().split("\n") if line]
    check_replies(replies, expected, "in a fresh process")


def check_served(url: str, name: str, version: str, held_out: Sequence[tuple[dict, dict]], timeout_seconds: float = 120) -> None:
    """Wait until the predictor serves a version, then ask it the held-out rows.

    Raises:
        DeploymentError: the version does not come, cannot be loaded, or a reply is not the one expected.
    """
    import httpx

    # Proxy settings of the environment are for the outside; the predictor is a neighbour.
    with httpx.Client(base_url=url, timeout=HTTP_TIMEOUT_SECONDS, trust_env=False) as client:
        wait_until_served(client, name, version, timeout_seconds)
        requests = [pair[0] for pair in held_out]
        replies = list(ask(client, name, requests, expected_version=version))
    check_replies(replies, [pair[1] for pair in held_out], f"at {predict_address(url, name)}")


def wait_until_served(client: "httpx.Client", name: str, version: str, timeout_seconds: float) -> None:
    """Poll `GET /v1/<name>` until it shows the version.

    Raises:
        DeploymentError: time is up, or the predictor says that it cannot load this version.
    """
    import httpx

    deadline = time.monotonic() + timeout_seconds
    seen = "no answer"
    while True:
        try:
            response = client.get(f"/v1/{quote(name)}")
            content = response.json() if response.status_code == 200 else {}
            if content.get("version") == version:
                return
            error = content.get("error")
            # A load that failed once may have met a hiccup of the store; the third failure is an answer.
            if error and error.get("version") == version and error.get("attempts", 0) >= 3:
                raise DeploymentError(f"the predictor at {client.base_url} cannot load {name} {version}: {error.get('message')}")
            seen = f"version {content.get('version')}, error {error}" if content else f"status {response.status_code}"
        except (httpx.HTTPError, ValueError) as error:
            seen = f"{type(error).__name__}: {error}"
        if time.monotonic() > deadline:
            raise DeploymentError(
                f"the predictor at {client.base_url} does not serve {name} {version} after {timeout_seconds:g} s (last seen: {seen}); "
                f"look at {client.base_url}readyz"
            )
        time.sleep(POLL_SECONDS)


def ask(client: "httpx.Client", name: str, requests: Sequence[dict], *, expected_version: str | None = None) -> Iterator[dict]:
    """Replies of the predictor, in order, asked in chunks that fit its limits.

    Raises:
        DeploymentError: an answer other than 200, or by another version than the one expected.
    """
    import httpx

    where = f"{client.base_url}v1/{name}/predict"
    # Our own questions are no traffic: drift checks must not take them for it.
    headers = {"Content-Type": "application/json", "X-Millstream-Log": "no"}
    for first, chunk in _chunks(requests):
        body = json.dumps({"items": chunk}, ensure_ascii=False).encode()
        try:
            response = client.post(f"/v1/{quote(name)}/predict", content=body, headers=headers)
        except httpx.HTTPError as error:
            raise DeploymentError(f"{where} did not answer row {first} and following: {type(error).__name__}: {error}") from error
        if response.status_code != 200:
            raise DeploymentError(f"{where} answered {response.status_code} to row {first} and following: {response.text[:500]}")
        content = response.json()
        if expected_version is not None and content["version"] != expected_version:
            raise DeploymentError(f"{where} answered row {first} and following with version {content['version']}, not {expected_version}")
        yield from content["replies"]


def check_replies(replies: Sequence[object], expected: Sequence[dict], where: str) -> None:
    """
    Raises:
        DeploymentError: too few or too many replies, or one that differs.
    """
    if len(replies) != len(expected):
        raise DeploymentError(f"{where}: {len(expected)} rows were asked, {len(replies)} replies came")
    for row, (reply, wanted) in enumerate(zip(replies, expected, strict=True)):
        if difference := check_reply(reply, wanted):
            raise DeploymentError(f"{where}: row {row} of {len(expected)} differs from the offline reply: {difference}")


def check_reply(found: object, wanted: object, path: str = "reply") -> str | None:
    """What differs, in words, or None. Numbers may differ by `TOLERANCE`; keys that are not expected are not looked at."""
    if isinstance(wanted, dict):
        if not isinstance(found, dict):
            return f"{path} is {found!r}, expected an object"
        for key, value in wanted.items():
            if key not in found:
                return f"{path}.{key} is missing, expected {value!r}"
            if difference := check_reply(found[key], value, f"{path}.{key}"):
                return difference
        return None
    if isinstance(wanted, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(wanted):
            return f"{path} is {found!r}, expected {len(wanted)} entries"
        differences = (check_reply(item, value, f"{path}[{index}]") for index, (item, value) in enumerate(zip(found, wanted, strict=True)))
        return next(filter(None, differences), None)
    if _is_number(wanted) and _is_number(found):
        difference = abs(float(found) - float(wanted))  # type: ignore[arg-type]
        # A NaN compares false to everything, so ask for closeness and not for distance.
        close = difference <= TOLERANCE
        return None if close else f"{path} is {found!r}, expected {wanted!r}, off by {difference:.3g} (at most {TOLERANCE:g})"
    # Python holds True == 1; in JSON they are different values.
    same = found == wanted and isinstance(found, bool) == isinstance(wanted, bool)
    return None if same else f"{path} is {found!r}, expected {wanted!r}"


def predict_address(predictor_url: str, name: str) -> str:
    return f"{predictor_url.rstrip('/')}/v1/{name}/predict"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _chunks(requests: Sequence[dict]) -> Iterator[tuple[int, list[dict]]]:
    """(index of the first, requests) of each chunk, within HTTP_CHUNK_ITEMS and, beyond one request, HTTP_CHUNK_BYTES."""
    chunk: list[dict] = []
    first = size = 0
    for index, request in enumerate(requests):
        num_bytes = len(json.dumps(request, ensure_ascii=False).encode())
        if chunk and (len(chunk) == HTTP_CHUNK_ITEMS or size + num_bytes > HTTP_CHUNK_BYTES):
            yield first, chunk
            chunk, first, size = [], index, 0
        chunk.append(request)
        size += num_bytes
    if chunk:
        yield first, chunk


def _other_schema(champion: ModelVersion, version: ModelVersion) -> str:
    return (
        f"{version.name} is taken: its champion {champion.version} (labels {champion.options.get('labels')}) answers other questions than "
        f"this model (labels {version.options.get('labels')}), and its callers would break; "
        f"give this model another name, e.g. NAME={version.name}-2"
    )


def answer_lines(bundle_folder: Path, lines: Iterable[str], write: Callable[[str], object]) -> None:
    """Answer each JSON line with one, each request on its own."""
    from ml.predictor import load_predictor

    predictor = load_predictor(bundle_folder)
    for line in lines:
        write(json.dumps(predictor.predict([json.loads(line)])[0], ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.stdin.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]
    answer_lines(Path(sys.argv[1]), sys.stdin, sys.stdout.write)
