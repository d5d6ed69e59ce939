"""Errors that the user can act on are shown as a message; anything else keeps its traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ml.errors import MillstreamError


@contextmanager
def reported_errors() -> Iterator[None]:
    """Print a MillstreamError and exit with its code."""
    try:
        yield
    except MillstreamError as error:
        print(f"\nmillstream: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        print("\nmillstream: interrupted; run the same command again to go on from the last checkpoint", file=sys.stderr)
        raise typer.Exit(130) from None
