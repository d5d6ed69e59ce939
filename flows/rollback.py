"""Serves the previous champion of a model again: from the Prefect UI, or by an automation."""

from prefect import flow
from pydantic import BaseModel, ConfigDict, Field

from ml.artifacts import Deployment
from ml.events import ModelName
from tasks.rollback import confirm_served, exchange_champion, publish_rollback


class RollbackRequest(BaseModel):
    """Which model goes back, and why: the form in the Prefect UI."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ModelName = Field(description="the model; its previous champion is served again")
    why: str = Field(default="rollback by hand", min_length=1, max_length=500, description="the reason, kept with the alias")


@flow(name="rollback", flow_run_name="{request.name}", persist_result=False)
def rollback(request: RollbackRequest) -> Deployment:
    """Exchange champion and previous, and wait until the predictor serves it. Fails, with nothing changed, when there is no previous."""
    deployment = confirm_served(exchange_champion(request.name, request.why))
    publish_rollback(deployment)
    return deployment
