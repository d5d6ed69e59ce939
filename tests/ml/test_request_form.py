"""The form of a run request: what its JSON Schema offers and refuses, as Prefect's server reads it, and what pydantic adds."""

from typing import Any

import pytest
from prefect.utilities.schema_tools import is_valid_schema, validate
from prefect.utilities.schema_tools.validation import ValidationError

from ml.config import EvaluateConfig, RunRequest
from ml.errors import ConfigError
from ml.events import Cause
from ml.request_form import profile_names, setting_schemas
from ml.solution import solution_names
from tests.e2e.conftest import QUICK_SETTINGS

FORM: dict[str, Any] = RunRequest.model_json_schema()


def check(request: dict[str, Any]) -> None:
    """As the server does with what is sent to it."""
    schema = {"type": "object", "properties": {"request": {"$ref": "#/definitions/RunRequest"}}, "required": ["request"]}
    definition = {key: value for key, value in FORM.items() if key != "$defs"}
    definition["properties"] = {**FORM["properties"], "cause": {"anyOf": [{"$ref": "#/definitions/Cause"}, {"type": "null"}]}}
    schema["definitions"] = {**FORM["$defs"], "RunRequest": definition}
    is_valid_schema(schema)
    validate({"request": request}, schema, raise_on_error=True)


def test_names_are_offered_as_they_are_registered():
    assert FORM["properties"]["solution"]["enum"] == solution_names()
    assert FORM["properties"]["profile"]["enum"] == profile_names()
    assert {"quick", "full"} <= set(profile_names())


def test_every_field_is_described_and_none_is_a_switch_between_something_and_nothing():
    for position, (name, field) in enumerate(FORM["properties"].items()):
        assert field["description"], name
        assert field["position"] == position
        assert ("anyOf" in field) == (name == "cause")


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"name": None, "data": None, "budget_minutes": None, "seed": None, "cause": None},
        {"name": "", "data": "", "text_column": ""},
        {"name": "reviews", "overrides": {"train.epochs": "auto", "data.group_column": None, "seed": 3, "compression": ["dynamic_int8"]}},
        {"overrides": {"data.where.source": ["rotten_tomatoes"], "data.label_names": {"0": "bad"}, "contract": "sentiment"}},
        {"cause": Cause(kind="data.arrived", summary="x", event_ids=("a",)).model_dump(mode="json")},
    ],
)
def test_what_a_request_may_hold_passes_form_and_pydantic(request_: dict[str, Any]):
    check(request_)
    RunRequest.model_validate(request_)


def test_the_settings_of_the_end_to_end_tests_pass():
    import yaml

    check({"overrides": {key: yaml.safe_load(value) for key, value in (setting.split("=") for setting in QUICK_SETTINGS)}})


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"solution": "sentimant"}, "'sentimant' is not one of"),
        ({"solution": "os.path"}, "'os.path' is not one of"),
        ({"profile": "quik"}, "'quik' is not one of"),
        ({"name": "Not A Name"}, "does not match"),
        ({"budget_minutes": 0}, "minimum of 0"),
        ({"budget_minutes": 1e9}, "maximum of 10080"),
        ({"seed": 1.5}, "1.5 is not"),
        ({"epochs": 3}, "'epochs' was unexpected"),
        ({"overrides": {"train.epochz": 3}}, "'train.epochz' was unexpected"),
        ({"overrides": {"train.epochs": 0}}, "0 is "),
        ({"overrides": {"split.test_fraction": 0.7}}, "maximum of 0.5"),
        ({"overrides": {"model.pooling": "max"}}, "'max' is not"),
    ],
)
def test_a_wrong_value_is_refused_by_the_form_and_by_pydantic(request_: dict[str, Any], said: str):
    with pytest.raises(ValidationError, match=said):
        check(request_)
    with pytest.raises((ConfigError, ValueError)):
        RunRequest.model_validate(request_)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"overrides": {"compression": ["dynamic_int9"]}}, "did you mean 'dynamic_int8'"),
        ({"overrides": {"train.epochz": 3}}, "did you mean 'epochs'"),
        ({"profile": "quik"}, "did you mean 'quick'"),
        ({"overrides": {"contract": "sentimant"}}, "did you mean 'sentiment'"),
        ({"data": "/data/.csv"}, "no model name can be made"),
    ],
)
def test_what_no_schema_can_say_is_refused_by_the_request_itself(request_: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        RunRequest.model_validate(request_)


def test_every_setting_of_a_section_has_its_bounds():
    settings = setting_schemas()
    assert settings["evaluate.rounds"] == {"minimum": EvaluateConfig.model_fields["rounds"].metadata[0].ge, "type": "integer"}
    assert {"model.encoder", "compression", "contract", "seed", "budget_minutes"} <= set(settings)
    assert not {"solution", "name", "profile", "cause"} & set(settings)
