"""`millstream lineage` and `millstream rollback`: what is live, where it came from, and the way back."""

import getpass

from rich.console import Console
from rich.table import Table

from ml.errors import BadInputError
from ml.registry import ModelVersion, Registry
from ml.settings import load_settings
from ml.storage.connect import open_artifact_store
from services.local_stack import running_stack


def show_lineage(name: str) -> None:
    """Print, for the champion of a name, the run, the data by digest, the settings that differ from the defaults, and the moves."""
    with running_stack(load_settings().state_dir):
        registry = Registry(open_artifact_store())
        version = champion(registry, name)
        aliases = registry.read_aliases(name)
    table = Table(title=f"{name}: champion {version.version}", show_header=False, title_justify="left")
    rows = {
        "alias moved": f"{aliases.when} by {aliases.who}, move {aliases.generation}: {aliases.why}",
        "previous champion": aliases.previous or "none",
        "made by run": version.run_id,
        "solution": version.solution,
        "method": str(version.provenance.get("method", "")),
        "bundle sha256": version.bundle.digest,
        **{f"data {item}": digest for item, digest in version.data.items()},
        **{f"test {metric}": f"{value:.4f}" for metric, value in version.metrics.items()},
    }
    for key, value in rows.items():
        table.add_row(key, str(value))
    Console().print(table)


def roll_back(name: str, why: str) -> None:
    """Move the champion alias to the previous version; a running predictor follows within seconds."""
    with running_stack(load_settings().state_dir):
        registry = Registry(open_artifact_store())
        before = champion(registry, name).version
        aliases = registry.rollback(name, getpass.getuser(), why)
    print(f"millstream: {name} serves {aliases.champion} again, no longer {before}")


def champion(registry: Registry, name: str) -> ModelVersion:
    """
    Raises:
        BadInputError: no model of that name was deployed.
    """
    aliases = registry.read_aliases(name)
    if aliases.champion is None:
        known = [known for known in registry.list_names() if registry.read_aliases(known).champion]
        raise BadInputError(f"there is no champion of {name!r}; deployed models: {', '.join(known) or 'none, run `make run` first'}")
    return registry.get_version(name, aliases.champion)
