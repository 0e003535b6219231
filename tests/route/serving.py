"""The body of a process that serves a tiny model; imported before it is forked."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import argosy.cli.commands.serve
import argosy.model.families
import argosy.open.engine
import argosy.serve.run
from argosy.cli.main import main as command

PRELOADED = (argosy.cli.commands.serve, argosy.open.engine, argosy.model.families, argosy.serve.run)


def main(args: Sequence[str]) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process
    os.dup2(sys.stderr.fileno(), 2)
    sys.exit(command(args))
