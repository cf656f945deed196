"""The verbs: a parser made of each verb's settings, one line for a user's error, and the exit code.

Exit codes: 0 done, 2 bad usage or input (one line on stderr, no traceback), 3 an alias that ``encoders promote
--exit_code`` left where it was, 85 preempted after a checkpoint, 130 stopped by
Ctrl-C, 1 anything else.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ca2cl import __version__
from ca2cl.errors import InputError, LocalError, nearest
from ca2cl.redact import RedactingFormatter, redact
from ca2cl.training.preempt import EXIT_INTERRUPTED, StopFlag, end_with_launcher

_RECIPES = Path(__file__).parent / "recipes"


class Verb(NamedTuple):
    """Where a verb's code is: a module with ``run(settings)``, and the settings' dataclass in ``settings_module``."""

    summary: str
    module: str
    settings: str
    settings_module: str = ""
    stops: bool = False
    """Whether it ends by SIGTERM with a checkpoint, and 85; while it trains by Ctrl-C, too, with 130."""
    raw: bool = False
    """Whether ``run`` takes the words of the command line as they are."""
    kept: str = "run it again"
    """What Ctrl-C leaves, and how to go on."""


_CELLS_KEPT = "finished cells and checkpoints are kept, and the same command goes on"
# A verb of two words belongs to the group that its first word names; that word may be a verb by itself, too.
VERBS = {
    "shard": Verb(
        "tiles in folders or a Hugging Face data set -> WebDataset shards",
        "ca2cl.data.shard",
        "ShardConfig",
        kept="finished shards are kept, and the same command goes on",
    ),
    "pretrain": Verb(
        "shards -> an encoder in MLflow's registry",
        "ca2cl.pretrain",
        "PretrainConfig",
        "ca2cl.config",
        stops=True,
        kept="checkpoints are kept, and the same command goes on",
    ),
    "launch": Verb(
        "accelerate launch, with exit codes and signals handed on: for schedulers", "ca2cl.launch", "", raw=True
    ),
    "probe": Verb("score a frozen encoder on labelled shards", "ca2cl.evaluation.probe", "ProbeConfig"),
    "finetune": Verb(
        "train an encoder on labelled shards and score it",
        "ca2cl.evaluation.finetune",
        "FinetuneConfig",
        stops=True,
        kept=_CELLS_KEPT,
    ),
    "embed": Verb(
        "tiles -> a file of an encoder's vectors",
        "ca2cl.evaluation.embed",
        "EmbedConfig",
        kept="finished parts are kept, and the same command goes on",
    ),
    "export": Verb(
        "an encoder -> a file for torchvision, timm, detectron2 or ONNX", "ca2cl.export.verb", "ExportConfig"
    ),
    "detect": Verb(
        "train a gland detector from an encoder and score it",
        "ca2cl.detection.detect",
        "DetectConfig",
        "ca2cl.detection.detect_config",
        stops=True,
        kept=_CELLS_KEPT,
    ),
    "detect prepare": Verb("images with gland masks -> COCO files", "ca2cl.detection.prepare", "PrepareConfig"),
    "detect predict": Verb(
        "images -> COCO, masks and overlays of a detector", "ca2cl.detection.predict", "PredictConfig"
    ),
    "report": Verb("a run -> one HTML page that shows and scores it", "ca2cl.report.verb", "ReportConfig"),
    "encoders list": Verb("registered encoders and what they score", "ca2cl.tracking.encoders_list", "ListConfig"),
    "encoders show": Verb("one encoder: card, lineage, downstream runs", "ca2cl.tracking.encoders_show", "ShowConfig"),
    "encoders compare": Verb(
        "downstream metrics of encoders side by side", "ca2cl.tracking.encoders_compare", "CompareConfig"
    ),
    "encoders promote": Verb(
        "give an encoder an alias, if it is better", "ca2cl.tracking.encoders_promote", "PromoteConfig"
    ),
    "encoders import": Verb(
        "register an encoder that came from elsewhere", "ca2cl.tracking.encoders_import", "ImportConfig"
    ),
    "reproduce nct": Verb(
        "the authors' tables, cell by cell, yours beside theirs",
        "ca2cl.reproduce.nct",
        "NctConfig",
        "ca2cl.reproduce.settings",
        kept="finished steps and cells are kept, and the same command goes on",
    ),
    "sync": Verb(
        "send to MLflow what it missed of a run",
        "ca2cl.tracking.sync",
        "SyncConfig",
        kept="what MLflow has by now it keeps, and the same command sends the rest",
    ),
    "doctor": Verb("look at the views that a recipe makes of your tiles", "ca2cl.doctor", "DoctorConfig"),
    "quickstart": Verb(
        "the whole pipeline on made-up tissue, in minutes",
        "ca2cl.quickstart",
        "QuickstartConfig",
        kept="the same command goes on where it was",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(RedactingFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[console])
    for chatty in ("alembic", "mlflow", "httpx", "datasets", "timm", "detectron2", "fvcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        return _dispatch(arguments)
    except InputError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        return _interrupted(arguments, own_process=argv is None)
    except Exception:  # noqa: BLE001 - a fault of ours: Python would show the same, but with the secrets of URIs in it
        sys.stderr.write(redact(traceback.format_exc()))
        return 1


def _interrupted(arguments: list[str], *, own_process: bool) -> int:
    """What Ctrl-C leaves, in one line; a second one then ends a process that still tidies up."""
    if own_process:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    verb = VERBS.get(" ".join(arguments[:2])) or VERBS.get("".join(arguments[:1]))
    if verb is not None and os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"ca2cl: stopped by Ctrl-C; {verb.kept}\n")
    return EXIT_INTERRUPTED


def _refuse(error: InputError) -> int:
    # One line for the job, not one for each of its processes: the first one speaks, unless it may not know.
    rank = os.environ.get("RANK", "0")
    if rank == "0" or isinstance(error, LocalError):
        by = "" if rank == "0" else f" (rank {rank})"
        sys.stderr.write(f"ca2cl: error{by}: {redact(' '.join(str(error).split()))}\n")
    return 2


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        sys.stdout.write(f"ca2cl {__version__}\n")
        return 0
    group = [name for name in VERBS if name.startswith(f"{arguments[0]} ")]
    if group and arguments[0] not in VERBS and arguments[1:2] in ([], ["-h"], ["--help"]):
        sys.stdout.write(_overview(group))
        return 0 if arguments[1:] else 2
    bare = arguments[0] in VERBS and (not arguments[1:] or arguments[1].startswith("-"))
    words = 2 if group and not bare else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if name not in VERBS:
        known = group or list(dict.fromkeys(verb.partition(" ")[0] for verb in VERBS))
        raise InputError(f"no verb {name!r}: {nearest(name, known)}")
    verb = VERBS[name]
    if verb.stops:  # before the imports, which take seconds
        StopFlag().install()
    end_with_launcher()
    settings = rest if verb.raw else parse(name, rest)
    if settings is None:
        return 0
    run: Callable[[Any], int] = importlib.import_module(verb.module).run
    return run(settings)


def _overview(names: Sequence[str] = ()) -> str:
    width = max(map(len, names or VERBS))
    lines = [f"  {name:{width}}  {VERBS[name].summary}" for name in names or VERBS]
    return (
        "usage: ca2cl VERB ...\n\nTrains image encoders for pathology without labels, and hands them on.\n\n"
        + "\n".join(lines)
        + "\n\nca2cl VERB --help shows a verb's settings.\n"
    )


def parse(name: str, arguments: list[str]) -> Any:
    """The settings object of verb ``name``, or None when only help or the resolved configuration was asked for.

    Raises:
        InputError: the arguments do not fit the verb's settings.
    """
    import jsonargparse

    verb = VERBS[name]
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    module = importlib.import_module(verb.settings_module or verb.module)
    kind = getattr(module, verb.settings)
    positional: tuple[str, ...] = getattr(module, "POSITIONAL", ())
    parser = jsonargparse.ArgumentParser(prog=f"ca2cl {name}", description=kind.__doc__, exit_on_error=False)
    grouped = any(dataclasses.is_dataclass(field.default_factory) for field in dataclasses.fields(kind))
    if grouped:
        parser.add_argument(
            "--config",
            action=jsonargparse.ActionConfigFile,  # type: ignore[attr-defined]
            help="YAML file of settings; flags after it win",
        )
        parser.epilog = f"--recipe NAME stands for the --config of a shipped recipe: {', '.join(recipes())}"
        arguments = _with_recipe(arguments)
    parser.add_class_arguments(kind)
    return _parsed(parser, kind, _spelt(arguments, positional, kind, parser))


def _parsed(parser: Any, kind: type, arguments: list[str]) -> Any:
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    try:
        values = parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(_explain(str(error), known)) from None
    except (UnicodeError, RecursionError, OSError) as error:  # what its reader of YAML lets through
        raise InputError(f"config cannot be read ({str(error)[:200]}); give a file of YAML") from None
    except SystemExit as end:
        if end.code == 0:
            return None
        raise InputError("bad usage: see --help") from None
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    built = instantiate(values)
    return kind(**{field.name: built[field.name] for field in dataclasses.fields(kind)})


def _underscored(arguments: list[str]) -> list[str]:
    """``--if-better`` is ``--if_better``."""
    parts = [argument.partition("=") if argument.startswith("--") else ("", "", argument) for argument in arguments]
    return [f"{name[:2]}{name[2:].replace('-', '_')}{equals}{value}" for name, equals, value in parts]


def _spelt(arguments: list[str], positional: tuple[str, ...], kind: type, parser: Any) -> list[str]:
    """Arguments as the parser takes them: a flag's name and one word.

    Words that are no flag's value are, wherever they stand, the settings that the verb lists as positional. A tuple
    takes words up to the next flag, as one JSON word: ``--labels 0.01 0.1``; a lone ``--json`` is ``--json true``.
    """
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    alone = {option for action in parser._actions if action.nargs in (0, "?") for option in action.option_strings}
    names, rest = list(positional), _underscored(arguments)
    if positional:
        shown = [f"{name.upper()} ..." if "tuple" in types[name] else name.upper() for name in positional]
        parser.usage = f"{parser.prog} {' '.join(shown)} [--setting VALUE ...]"
    spelt: list[str] = []
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            if not names:
                spelt.append(word)
                continue
            rest.insert(0, word)
            word = f"--{names.pop(0)}"
        spelt.append(word)
        if "=" not in word and word not in alone:
            spelt += _value(types.get(word[2:], ""), rest)
    return spelt


def _value(wanted: str, rest: list[str]) -> list[str]:
    """What a flag of the type ``wanted`` takes of the words after it."""
    if wanted == "bool" and (not rest or rest[0].lower() not in ("true", "false")):
        return ["true"]
    if "tuple" not in wanted:
        return [rest.pop(0)] if rest else []
    items: list[str] = []
    while rest and not rest[0].startswith("--"):
        items.append(rest.pop(0))
    if len(items) == 1 and items[0].startswith("["):
        return items
    # quoted, or a version's number would not pass for a word
    return [f"[{', '.join(json.dumps(item) if 'str' in wanted else item for item in items)}]"]


def _explain(message: str, known: list[str]) -> str:
    """A parser's complaint in one line, with the nearest spelling of an unknown key."""
    message = " ".join(message.split())
    unknown = re.search(r"unrecognized arguments: --([\w.]+)", message) or re.search(r"option '([\w.]+)'", message)
    group = re.search(r"Group '([\w.]+)'", message)
    if unknown is None:
        return message
    key = f"{group.group(1)}.{unknown.group(1)}" if group else unknown.group(1)
    return f"unknown setting {key}: {nearest(key, [option[2:] for option in known])}"


def recipes() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in _RECIPES.glob("*.yaml"))


def _with_recipe(arguments: list[str]) -> list[str]:
    """``--recipe NAME`` is ``--config`` of a shipped file."""
    replaced: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument != "--recipe" and not argument.startswith("--recipe="):
            replaced.append(argument)
            continue
        name = argument.partition("=")[2] or next(rest, "")
        if name not in recipes():
            raise InputError(f"no recipe {name!r}: {nearest(name, recipes())}")
        replaced += ["--config", str(_RECIPES / f"{name}.yaml")]
    return replaced
