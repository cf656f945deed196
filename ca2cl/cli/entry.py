"""Entry point of the command line.

Exit codes: 0 done, 2 bad usage or input (one line on stderr, no traceback), 3 an alias that ``encoders promote
--exit_code`` left where it was, 85 preempted after a checkpoint, 130 stopped by
Ctrl-C, 1 anything else.
"""

from __future__ import annotations

import importlib
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from ca2cl import __version__
from ca2cl.cli.help import overview
from ca2cl.cli.parser import parse
from ca2cl.cli.streams import Console, check_output, shield_streams
from ca2cl.cli.verbs import VERBS
from ca2cl.common.redact import redact
from ca2cl.errors import InputError, LocalError, nearest
from ca2cl.runtime.launched import forget_place, launched_rank
from ca2cl.runtime.signals import EXIT_INTERRUPTED, StopFlag, end_with_launcher


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    shield_streams()
    logging.basicConfig(level=logging.INFO, handlers=[Console()])
    for chatty in ("alembic", "mlflow", "httpx", "httpx2", "datasets", "timm", "detectron2", "fvcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        code = _dispatch(arguments)
        if code == 0:
            check_output()
        return code
    except InputError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        return _interrupted(arguments, own_process=argv is None)
    except Exception:  # noqa: BLE001 - a fault of ours: Python would show the same, but with the secrets of URIs in it
        sys.stderr.write(redact(traceback.format_exc()))
        return 1


def _interrupted(arguments: list[str], *, own_process: bool) -> int:
    """Print the verb's line after Ctrl-C; a second Ctrl-C then ends a process that is still closing files."""
    if own_process:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    verb = VERBS.get(" ".join(arguments[:2])) or VERBS.get("".join(arguments[:1]))
    if verb is not None and launched_rank() == 0:
        sys.stderr.write(f"ca2cl: stopped by Ctrl-C; {verb.kept}\n")
    return EXIT_INTERRUPTED


def _refuse(error: InputError) -> int:
    # One line for the job, not one for each of its processes: the first one speaks, unless it may not know.
    rank = launched_rank()
    if rank == 0 or isinstance(error, LocalError):
        by = f" (rank {rank})" if rank else ""
        sys.stderr.write(f"ca2cl: error{by}: {redact(' '.join(str(error).split()))}\n")
    return 2


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments == ["help"] or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_overview())
        return 0
    if arguments[0] == "help":  # ca2cl help probe
        arguments = [*arguments[1:], "--help"]
    if arguments[0] == "--version":
        sys.stdout.write(f"ca2cl {__version__}\n")
        return 0
    if arguments[0] == "doctor" and "--plan" in arguments:
        arguments = ["doctor", "plan", *(word for word in arguments[1:] if word != "--plan")]
    group = [name for name in VERBS if name.startswith(f"{arguments[0]} ")]
    if group and arguments[0] not in VERBS and arguments[1:2] in ([], ["-h"], ["--help"]):
        sys.stdout.write(_overview(group))
        return 0
    bare = arguments[0] in VERBS and (not arguments[1:] or arguments[1].startswith("-"))
    words = 2 if group and not bare else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if name not in VERBS:
        known = group or list(dict.fromkeys(verb.partition(" ")[0] for verb in VERBS))
        raise InputError(f"no verb {name!r}: {nearest(name, known)}")
    verb = VERBS[name]
    if verb.raw:
        forget_place()
    elif not verb.shared and (rank := launched_rank()):
        sys.stderr.write(f"ca2cl: rank {rank} leaves {name} to rank 0, which does all of it\n")
        return 0
    if verb.stops:  # before the imports, which take seconds
        StopFlag().install()
    end_with_launcher()
    settings = rest if verb.raw else parse(name, rest)
    if settings is None:
        return 0
    run: Callable[[Any], int] = importlib.import_module(verb.module).run
    return run(settings)


def _overview(names: Sequence[str] = ()) -> str:
    return (
        "usage: ca2cl VERB ...\n\nSelf-supervised pre-training and evaluation of image encoders for pathology.\n\n"
        + overview({name: VERBS[name].summary for name in names or VERBS})
        + "\n\nca2cl VERB --help shows a verb's settings and examples.\n"
    )
