"""The command line: verbs, parser, YAML files, launcher and quickstart."""

from ca2cl.cli.entry import main

__all__ = ["main"]
