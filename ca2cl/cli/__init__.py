"""The command line: verbs, parser, YAML files, launcher and quickstart. ``--help`` imports no torch."""
