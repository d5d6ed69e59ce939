"""Data contracts: one YAML file per kind of data, compiled to a Great Expectations suite."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ml.errors import ConfigError
from ml.settings import REPOSITORY_ROOT

if TYPE_CHECKING:
    from great_expectations.core.expectation_suite import ExpectationSuite

CONTRACTS_FOLDER = REPOSITORY_ROOT / "data_contracts"
LABELS = "$labels"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rule(_Section):
    """One expectation, under a name that people read in reports and in the quarantine.

    `with` holds the expectation's own arguments; the value `$labels` stands for the classes of the contract.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    expect: str = Field(pattern=r"^expect_[a-z_]+$", description="name of a Great Expectations expectation")
    column: str | None = None
    arguments: dict[str, Any] = Field(default_factory=dict, alias="with")


class Limits(_Section):
    """Shares that no single expectation can see."""

    max_quarantined_share: float = Field(default=0.2, ge=0, le=1, description="of the rows after cleaning")
    max_dropped_share: float = Field(default=0.8, ge=0, le=1, description="of the rows before cleaning")


class DataContract(_Section):
    """What rows must look like before a model learns from them."""

    name: str
    version: int = Field(ge=1)
    owner: str
    description: str = ""
    sensitive: tuple[str, ...] = Field(default=(), description="columns that may hold personal data")
    labels: Literal["infer"] | tuple[str, ...] = "infer"
    row_rules: tuple[Rule, ...]
    table_rules: tuple[Rule, ...] = ()
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _names_are_unique(self) -> "DataContract":
        names = [rule.name for rule in (*self.row_rules, *self.table_rules)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two rules have one name: {', '.join(twice)}")
        if columnless := [rule.name for rule in self.row_rules if rule.column is None]:
            raise ValueError(f"row rules need a column: {', '.join(columnless)}")
        return self


def load_contract(name: str) -> dict:
    """`data_contracts/<name>.yaml`, checked, as plain JSON values.

    Raises:
        ConfigError: there is no such contract, or a key or value in it is wrong.
    """
    from ml.config import nearest

    known = sorted(path.stem for path in CONTRACTS_FOLDER.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"there is no data contract {name!r}{nearest(name, known)}")
    values = yaml.safe_load((CONTRACTS_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return parse_contract(values).model_dump(mode="json", by_alias=True)


def parse_contract(values: object) -> DataContract:
    """Raises ConfigError, which names the key and the nearest known one."""
    from ml.config import validate

    return validate(DataContract, values, "contract")


def compile_suite(contract: DataContract, labels: Sequence[str], level: Literal["row", "table"]) -> "ExpectationSuite":
    """The contract's rules of one level as a Great Expectations suite; each expectation carries its rule's name.

    Raises:
        ConfigError: Great Expectations does not know an expectation, or its arguments are wrong.
    """
    from great_expectations.core.expectation_suite import ExpectationSuite

    rules = contract.row_rules if level == "row" else contract.table_rules
    suite = ExpectationSuite(name=f"{contract.name}-{level}-rules")
    for rule in rules:
        arguments = {key: list(labels) if value == LABELS else value for key, value in rule.arguments.items()}
        if rule.column is not None:
            arguments["column"] = rule.column
        try:
            suite.add_expectation_configurations([_configuration(rule, arguments)])
        except Exception as error:  # Great Expectations raises many kinds here, pydantic's among them
            raise ConfigError(
                f"contract {contract.name}, rule {rule.name}: {rule.expect} cannot be used with {arguments}: {error}"
            ) from error
    return suite


def _configuration(rule: Rule, arguments: dict[str, Any]) -> Any:
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    return ExpectationConfiguration(type=rule.expect, kwargs=arguments, meta={"rule": rule.name})
