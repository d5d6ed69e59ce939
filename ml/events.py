"""The one grammar of what can ask for a training run, from wherever it comes.

Something happens (`Event`): data arrived, drift was detected, a metric dropped, a person asks. The event bridge takes
events, puts those of one model together, and asks Prefect for a run; why it did is the run's `Cause`, kept in its config.
"""

import secrets
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

MODEL_NAME_PATTERN = r"[a-z0-9][a-z0-9_-]{0,62}"

ModelName = Annotated[str, Field(pattern=f"^{MODEL_NAME_PATTERN}$")]
EventKind = Literal["data.arrived", "drift.detected", "metric.dropped", "retrain.asked"]

RETRAIN_REQUESTED = "retrain.requested"
"""The only event that triggers a deployment; the event bridge emits it to Prefect."""


def new_event_id() -> str:
    return secrets.token_hex(12)


class Event(BaseModel):
    """One thing that happened to one model.

    Its `id` is the sender's: the same event sent again has the same one, and counts once. A sender that may send twice
    gives an id of its own; the default is another one each time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(default_factory=new_event_id, pattern=r"^[A-Za-z0-9._:-]{1,128}$")
    kind: EventKind
    name: ModelName = Field(description="the model that it concerns")
    occurred: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC), description="when it happened, with a time zone")
    source: str = Field(default="", max_length=200, description="who says so: object store, poll, drift check, a user")
    summary: str = Field(default="", max_length=500, description="what happened, in words")
    objects: tuple[str, ...] = Field(default=(), max_length=1000, description="data.arrived: s3:// addresses of the new objects")


class Cause(BaseModel):
    """Why a run was started: kept in its config, shown on its page and in its report."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["by hand", "schedule", "data.arrived", "drift.detected", "metric.dropped", "retrain.asked"] = "by hand"
    summary: str = Field(default="", description="in words; of several events, the first and how many more")
    request_id: str | None = Field(default=None, description="of the event bridge's request; the same one never starts two runs")
    event_ids: tuple[str, ...] = ()
    data_digest: str | None = Field(default=None, description="of names and etags of all objects under the model's prefix")


def resource_id(name: str) -> str:
    """The Prefect resource that `retrain.requested` of a model is about; a deployment's trigger matches it."""
    return f"millstream.model.{name}"
