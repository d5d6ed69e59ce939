"""Walks an object store and says what does not fit together. Knows the layout from the documentation, not from `ml.storage.keys`."""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from ml.storage.base import ObjectStore

ARTIFACT = re.compile(r"artifacts/sha256/([0-9a-f]{2})/([0-9a-f]{62})")


def find_problems(objects: ObjectStore, prefix: str) -> list[str]:
    """Every artifact has its digest; whatever a record, manifest or version names is there; aliases point at versions."""
    problems = []
    runs, registry = f"{prefix}runs", f"{prefix}registry"
    keys = {info.key for info in objects.list(runs)}
    digests = set()
    for key in keys:
        if match := ARTIFACT.fullmatch(key):
            expected = match[1] + match[2]
            digests.add(expected)
            if hashlib.sha256(objects.get(runs, key)).hexdigest() != expected:
                problems.append(f"{key}: the bytes are not those of the digest")
    for key in keys:
        if key.startswith("stages/") or key.endswith("/manifest.json"):
            problems += [
                f"{key}: names {digest}, which is not stored" for digest in _named(objects.get(runs, key)) if digest not in digests
            ]
        if key.startswith("runs/") and key.endswith("/manifest.json"):
            manifest = json.loads(objects.get(runs, key))
            for name, digest in manifest["files"].items():
                file_key = key.removesuffix("manifest.json") + name
                if file_key not in keys:
                    problems.append(f"{key}: {name} is missing")
                elif hashlib.sha256(objects.get(runs, file_key)).hexdigest() != digest:
                    problems.append(f"{key}: {name} is not the file that was written")
    registered = {info.key for info in objects.list(registry)}
    for key in registered:
        content = objects.get(registry, key)
        if "/versions/" in key:
            problems += [f"{key}: names {digest}, which is not stored" for digest in _named(content) if digest not in digests]
        elif key.endswith("/aliases.json"):
            aliases = json.loads(content)
            for alias in ("candidate", "champion", "previous"):
                version = aliases[alias]
                if version and key.replace("aliases.json", f"versions/{version}.json") not in registered:
                    problems.append(f"{key}: {alias} is {version}, which does not exist")
    return problems


def _named(content: bytes) -> Iterator[str]:
    """Digests of all artifact references, that is objects with `uri` and `sha256`, in a JSON document."""

    def walk(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if "uri" in value and "sha256" in value and ARTIFACT.search(value["uri"]):
                yield value["sha256"]
            for item in value.values():
                yield from walk(item)
        elif isinstance(value, list):
            for item in value:
                yield from walk(item)

    return walk(json.loads(content))
