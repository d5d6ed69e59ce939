"""The form of a run request in the Prefect UI, which is drawn from RunRequest's JSON Schema.

What the schema forbids is refused when the form is sent, before there is a run. So the schema is told more than pydantic
writes into it: the names of solutions, profiles and settings that there are, and the bounds of each setting.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

# Settings that hold keys of the user's own.
_OPEN_SETTINGS = ("contract", "data.where", "data.label_names")


def shape_form(schema: dict[str, Any]) -> None:
    """Change the JSON Schema of RunRequest, in place, into that of the form."""
    from ml.solution import solution_names

    fields = schema["properties"]
    for position, field in enumerate(fields.values()):
        field["position"] = position  # a database may return the keys in another order
        _without_null(field)
    fields["solution"]["enum"] = solution_names()
    fields["profile"]["enum"] = profile_names()
    # A field that was filled in and cleared again is sent as an empty text.
    fields["name"]["pattern"] = f"^$|{fields['name']['pattern']}"
    # Not `properties`: of those the form would draw a field each. "Unevaluated", because its refusal is short: "additional"
    # lists all patterns.
    overrides = fields["overrides"]
    del overrides["additionalProperties"]
    overrides["patternProperties"] = {f"^{_literally(path)}$": values for path, values in setting_schemas().items()}
    overrides["patternProperties"] |= {rf"^{_literally(path)}\.": {} for path in _OPEN_SETTINGS}
    overrides["unevaluatedProperties"] = False


def profile_names() -> list[str]:
    """Profiles of all solutions, in the order of their files. Whether one belongs to a solution is for `resolve_config` to say."""
    from ml.config import read_solution_config
    from ml.solution import solution_names

    return list(dict.fromkeys(profile for name in solution_names() for profile in read_solution_config(name).get("profiles", {})))


def setting_schemas() -> dict[str, dict[str, Any]]:
    """Every setting that `overrides` may change, by its path, with the JSON Schema of its values."""
    from ml.config import RunConfig
    from ml.solution import load_solution, solution_names

    found: dict[str, dict[str, Any]] = {}
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if name in ("solution", "name", "profile", "cause", "model"):
            continue  # what the request itself says, and what each solution has of its own
        if isinstance(section, type) and issubclass(section, BaseModel):
            found |= {f"{name}.{key}": values for key, values in _field_schemas(section).items()}
        else:
            found[name] = {}
    own = [_field_schemas(load_solution(solution).model_config) for solution in solution_names()]
    for key in dict.fromkeys(key for fields in own for key in fields):
        found[f"model.{key}"] = {"anyOf": [fields[key] for fields in own if key in fields]}
    return found


def _field_schemas(section: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """The bounds of each field; none where they refer to another model's schema, which pydantic then checks alone."""
    told = ("title", "description", "default")
    fields: Mapping[str, dict[str, Any]] = section.model_json_schema()["properties"]
    return {
        key: {} if "$ref" in str(values) else {word: value for word, value in values.items() if word not in told}
        for key, values in fields.items()
    }


def _without_null(field: dict[str, Any]) -> None:
    """An optional value is a field that may stay empty; as "this or null" it would be a switch that people must find first.

    Prefect's server takes null for a field that has no default.
    """
    kinds = [kind for kind in field.get("anyOf", []) if kind.get("type") != "null"]
    if field.get("default", ...) is None and len(kinds) == 1 and "type" in kinds[0]:
        del field["anyOf"], field["default"]
        field |= kinds[0]


def _literally(path: str) -> str:
    return path.replace(".", r"\.")
