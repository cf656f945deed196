"""The command line: verbs, parser, YAML files, launcher and quickstart. ``--help`` imports no torch."""

from ca2cl.cli.entry import main

__all__ = ["main"]
