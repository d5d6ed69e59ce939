"""The `millstream` command. Each command is a few lines here; what it does lives in the module it calls."""

from pathlib import Path
from typing import Annotated

import typer

from cli.errors import reported_errors

app = typer.Typer(
    name="millstream",
    help="Raw data in, a small, fast, deployed model out, or a clear reason why not.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Name = Annotated[str | None, typer.Option(help="model name in the registry and in its URL")]


@app.command()
def run(
    solution: Annotated[str, typer.Option(help="recipe: a folder of solutions/")] = "sentiment",
    name: Name = None,
    profile: Annotated[str, typer.Option(help="a profile of the solution's config.yaml")] = "quick",
    data: Annotated[str | None, typer.Option(help="CSV, Parquet or JSONL file or folder, or s3://bucket/prefix")] = None,
    text: Annotated[str | None, typer.Option(help="column with the text")] = None,
    label: Annotated[str | None, typer.Option(help="column with the class")] = None,
    encoding: Annotated[str | None, typer.Option(help="text encoding of the files; detected by default")] = None,
    encoder: Annotated[str | None, typer.Option(help="Hugging Face folder, s3:// prefix, package:<name>/<folder>, or hub name")] = None,
    budget_minutes: Annotated[float | None, typer.Option(help="time the run may take; large data is sampled to fit")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="any other setting, e.g. --set train.epochs=3")] = None,
) -> None:
    """Train, compress, judge and serve a model. Exit 0 deployed or unchanged, 3 rejected, 2 bad input, 1 failure."""
    with reported_errors():
        from cli.run_command import run_pipeline

        raise typer.Exit(
            run_pipeline(
                {
                    "solution": solution,
                    "name": name,
                    "profile": profile,
                    "data": data,
                    "text_column": text,
                    "label_column": label,
                    "encoding": encoding,
                    "encoder": encoder,
                    "budget_minutes": budget_minutes,
                },
                set_ or [],
            )
        )


@app.command()
def up() -> None:
    """Start everything: object store, Prefect server and UI, worker, predictor, event bridge; and keep it running."""
    with reported_errors():
        from cli.stack_commands import start_stack

        start_stack()


@app.command()
def down() -> None:
    """Stop what `up` started. The state stays."""
    with reported_errors():
        from cli.stack_commands import stop_stack

        stop_stack()


@app.command()
def status() -> None:
    """Show what runs, where, and whether it is healthy. Exit 1 when a part is not."""
    with reported_errors():
        from cli.stack_commands import show_status

        raise typer.Exit(show_status())


@app.command()
def logs(
    lines: Annotated[int, typer.Option(min=1, help="last lines")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on with what comes, until Ctrl-C")] = False,
) -> None:
    """Show the log of all parts, in one."""
    with reported_errors():
        from cli.stack_commands import show_logs

        show_logs(lines, follow)


@app.command()
def predict(
    data: Annotated[str, typer.Option(help="CSV, Parquet or JSONL file or folder, or s3://bucket/prefix")],
    out: Annotated[Path, typer.Option(help="file to write: .csv, .parquet or .jsonl")],
    name: Annotated[str, typer.Option(help="model name")] = "sentiment",
    text: Annotated[str | None, typer.Option(help="column with the text")] = None,
    encoding: Annotated[str | None, typer.Option(help="text encoding of the files")] = None,
) -> None:
    """Score the rows of a file with the champion."""
    with reported_errors():
        from cli.predict_command import predict_rows

        predict_rows(data, out, name, text, encoding)


@app.command()
def lineage(name: Annotated[str, typer.Argument(help="model name")] = "sentiment") -> None:
    """Show which data, which run and which settings made what is live."""
    with reported_errors():
        from cli.registry_commands import show_lineage

        show_lineage(name)


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="model name")] = "sentiment",
    why: Annotated[str, typer.Option(help="reason, kept with the alias")] = "rollback by hand",
) -> None:
    """Make the previous champion the champion again."""
    with reported_errors():
        from cli.registry_commands import roll_back

        roll_back(name, why)


@app.command()
def retrain(
    name: Annotated[str, typer.Argument(help="model name")] = "sentiment",
    why: Annotated[str, typer.Option(help="reason, kept with the run")] = "asked for by hand",
) -> None:
    """Ask the event bridge for a training run of a model."""
    with reported_errors():
        from cli.event_commands import ask_for_run

        ask_for_run(name, why)


@app.command()
def events(
    name: Annotated[str | None, typer.Argument(help="model name; all when left out")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="how many")] = 20,
) -> None:
    """Show the latest events and what became of each."""
    with reported_errors():
        from cli.event_commands import show_events

        show_events(name, limit)


@app.command("clean-up")
def clean_up(
    delete: Annotated[bool, typer.Option("--delete", help="delete; without it, only tell what would go")] = False,
    delete_versions: Annotated[bool, typer.Option(help="also old model versions under no alias")] = False,
    keep_runs: Annotated[int, typer.Option(help="last runs kept of each model")] = 20,
    keep_run_days: Annotated[float, typer.Option(help="younger runs are kept as well")] = 30,
    grace_hours: Annotated[float, typer.Option(help="what is younger stays")] = 72,
    wait_minutes: Annotated[float, typer.Option(help="how long to wait for runs that are going on")] = 0,
) -> None:
    """Delete what nobody needs any more; by default only tell what would go."""
    with reported_errors():
        from cli.clean_up_command import clean_up as run_clean_up
        from ml.config import validate
        from ml.retention import CleanUpRequest

        values = {
            "dry_run": not delete,
            "delete_versions": delete_versions,
            "keep_runs": keep_runs,
            "keep_run_days": keep_run_days,
            "grace_hours": grace_hours,
            "wait_minutes": wait_minutes,
        }
        run_clean_up(validate(CleanUpRequest, values, ""))


@app.command()
def clean(yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False) -> None:
    """Stop everything and remove the local state: stored data, models, runs, logs."""
    with reported_errors():
        from cli.stack_commands import remove_state

        remove_state(ask=not yes)
