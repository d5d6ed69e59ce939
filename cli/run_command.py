"""`millstream run`: the stack for as long as it is needed, the flow, and what it led to on one screen."""

from typing import cast

import yaml

from ml.config import RunRequest, resolve_config, validate
from ml.errors import ConfigError
from ml.settings import load_settings
from services.flow_process import configure_logging, remembered_flow_run
from services.local_stack import LocalStack


def run_pipeline(options: dict, overrides: list[str]) -> int:
    """Run the training pipeline and print its outcome; returns the exit code.

    Raises:
        MillstreamError: what stopped the run, after its outcome was written.
    """
    given = {key: value for key, value in options.items() if value is not None}
    request: RunRequest = validate(RunRequest, {**given, "overrides": dict(map(parse_override, overrides))}, "")
    config = resolve_config(request)  # a wrong setting is said at once, not after the stack has started
    print(f"millstream: {config.solution} model {config.name!r}, profile {config.profile}, data {config.data.source}")

    configure_logging()
    stack = LocalStack(load_settings().state_dir)
    print("millstream: starting the object store, the Prefect server and the predictor (up to a minute the first time)", flush=True)
    with stack.running() as addresses:
        print(f"millstream: Prefect UI at {addresses.prefect_ui_url}", flush=True)
        from prefect import Flow
        from prefect.logging.handlers import APILogHandler

        from flows.training_pipeline import training_pipeline
        from ml.report.table import print_outcome

        with remembered_flow_run(stack.state_dir) as remember:
            try:
                outcome = cast(Flow, training_pipeline).with_options(on_running=[remember])(request)
            finally:
                APILogHandler().flush()  # else the last lines are sent when the server is gone already
        print_outcome(outcome)
    if not stack.stays_up:
        print("The stack ran for this run only. `make up` opens the Prefect UI and the predictor on the same state.")
    return outcome.exit_code


def parse_override(text: str) -> tuple[str, object]:
    """'train.epochs=3' -> ("train.epochs", 3); the value is read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {text!r}: write it as key=value, e.g. train.epochs=3")
    return key.strip(), yaml.safe_load(value)
