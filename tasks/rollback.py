"""Serve the previous champion again: tasks around `ml.registry` and `ml.deployment`."""

import getpass

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from ml.artifacts import Deployment
from ml.deployment import check_served, predict_address
from ml.registry import Registry
from ml.settings import load_settings
from ml.storage.connect import open_artifact_store
from tasks.options import artifact_key, stage_task


# Never tried again: a rollback done twice is none.
@task(cache_policy=NO_CACHE, persist_result=False)
def exchange_champion(name: str, why: str) -> Deployment:
    """Make `previous` the champion and the champion `previous`.

    Raises:
        DeploymentError: there is no previous version.
    """
    aliases = Registry(open_artifact_store()).rollback(name, getpass.getuser(), why)
    reason = f"{aliases.champion} is champion again, no longer {aliases.previous}: {why}"
    return Deployment(status="deployed", name=name, version=aliases.champion, previous_version=aliases.previous, reasons=(reason,))


@stage_task()
def confirm_served(deployment: Deployment) -> Deployment:
    """Wait until the predictor serves the champion; does nothing where no predictor is known.

    Raises:
        DeploymentError: it does not, though the alias has moved.
    """
    url = load_settings().predictor_url
    if url is None or deployment.version is None:
        return deployment.model_copy(update={"reasons": (*deployment.reasons, "no predictor is known here, so none was asked")})
    check_served(url, deployment.name, deployment.version, [])
    address = predict_address(url, deployment.name)
    return deployment.model_copy(update={"predict_url": address, "reasons": (*deployment.reasons, f"{address} serves it")})


@stage_task()
def publish_rollback(deployment: Deployment) -> None:
    """Show on the run page what was done."""
    lines = [f"## {deployment.name} serves {deployment.version}", "", *(f"- {reason}" for reason in deployment.reasons)]
    create_markdown_artifact("\n".join(lines), key=artifact_key(deployment.name, "rollback"), description=deployment.version or "")
