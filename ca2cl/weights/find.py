"""Find weights by name: timm's, the hub's, a folder's or a file's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ca2cl.common.arch_names import HUB, TIMM
from ca2cl.common.records import why_not_tensors
from ca2cl.errors import InputError, nearest
from ca2cl.models.timm.spelling import timm_name
from ca2cl.weights.hub import Repository, Unreachable, commit_of, parse_repository
from ca2cl.weights.licence import Licence, beside, stated
from ca2cl.weights.timm_config import CONFIG, Stated, read_config

FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.safetensors", "model.bin", "pytorch_model.pth")
"""Names of the weights in a repository, in order of preference."""


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights on this machine.

    Attributes:
        path: of the file.
        source: its name, with the commit where it is of the hub.
        stated: what its source states about it.
        licence: as its source states it.
    """

    path: Path
    source: str
    stated: Stated
    licence: Licence


def is_public(source: str) -> bool:
    """Whether ``source`` is a name of timm's or of the hub's."""
    return source.startswith((TIMM, HUB))


def find_public(source: str) -> WeightsFile:
    """The file that ``timm:NAME[.TAG]`` or ``hf-hub:ORG/NAME[/FILE][@REVISION]`` names, downloaded where needed.

    Raises:
        InputError: unknown, not permitted, out of reach, or without weights.
    """
    return _of_timm(source) if source.startswith(TIMM) else _of_hub(source)


def find_local(path: Path) -> WeightsFile:
    """A file of weights, with what a timm ``config.json`` and a licence beside it state.

    Raises:
        InputError: the configuration is damaged.
    """
    config = path.parent / CONFIG
    facts = read_config(config if config.is_file() else None, str(path), _beside(path.parent))
    return WeightsFile(path, str(path.resolve()), facts, beside(path))


def find_in_folder(folder: Path) -> WeightsFile | None:
    """The weights of a downloaded timm repository; None where the folder is none.

    Raises:
        InputError: it has a configuration, but no weights.
    """
    if not (folder / CONFIG).is_file():
        return None
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        raise InputError(
            f"encoder {str(folder)!r}: a {CONFIG} without weights; put one of {', '.join(FILES)} beside it"
        )

    get = _beside(folder)
    facts = read_config(folder / CONFIG, str(folder), get)
    return WeightsFile(path, str(path.resolve()), facts, stated(get, facts.licence))


def _beside(folder: Path) -> Callable[[str], Path | None]:
    """A reader of files of a folder."""

    def get(name: str) -> Path | None:
        return folder / name if (folder / name).is_file() else None

    return get


def _of_hub(source: str) -> WeightsFile:
    repository, file = parse_repository(source)
    path = repository.get(file) if file else _weights(repository)
    commit = commit_of(path)
    fixed = replace(repository, revision=commit or repository.revision)  # what belongs to these very weights
    facts = read_config(fixed.find(CONFIG), source, _optional(fixed))
    shown = f"{HUB}{repository.name}{f'/{file}' if file else ''}{f'@{commit}' if commit else ''}"
    return WeightsFile(path, shown, facts, stated(_optional(fixed), facts.licence))


def _weights(repository: Repository) -> Path:
    path = repository.find(*FILES)
    if path is None:
        repository.get(FILES[0])  # which says that it is missing
        raise AssertionError(FILES)
    return path


def _optional(repository: Repository) -> Callable[[str], Path | None]:
    """A reader of files that say more about the weights; none where neither hub nor cache has them."""

    def get(name: str) -> Path | None:
        try:
            return repository.find(name)
        except Unreachable:
            return None

    return get


def _of_timm(source: str) -> WeightsFile:
    settings = _settings(source)
    facts = Stated(
        arch=TIMM + settings.architecture,
        mean=tuple(settings.mean),
        std=tuple(settings.std),
        input_size=settings.input_size[1],
        licence=settings.license,
    )
    tag = f"{TIMM}{settings.architecture}.{settings.tag}"
    if not settings.hf_hub_id:
        return WeightsFile(_by_url(settings, source), tag, facts, Licence(settings.license))
    repository = replace(parse_repository(HUB + settings.hf_hub_id)[0], shown=source)
    path = repository.get(settings.hf_hub_filename) if settings.hf_hub_filename else _weights(repository)
    commit = commit_of(path)
    fixed = replace(repository, revision=commit or repository.revision)
    shown = f"{tag}{f'@{commit}' if commit else ''}"
    return WeightsFile(path, shown, facts, stated(_optional(fixed), settings.license))


def _settings(source: str) -> Any:
    """timm's configuration of these weights.

    Raises:
        InputError: no such model or tag, or a model without weights.
    """
    from timm.models import get_pretrained_cfg, list_pretrained

    name = source.removeprefix(TIMM)
    if "," in name:
        raise InputError(f"encoder {source!r}: arguments belong to model.arch; give {TIMM}NAME.TAG")
    model, _, tag = name.partition(".")
    known = [one.partition(".")[2] for one in list_pretrained(f"{timm_name(TIMM + model)}.*")]
    if not known:
        raise InputError(f"encoder {source!r}: timm has no weights of {model}; give another source")
    if tag and tag not in known:
        raise InputError(f"encoder {source!r}: timm has no weights {tag!r} of {model}; {nearest(tag, known)}")
    return get_pretrained_cfg(name)


def _by_url(settings: Any, source: str) -> Path:
    """A file that timm keeps outside the hub, in torch's cache."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(settings.url).name
    if path.exists():
        return path
    prefix = torch.hub.HASH_REGEX.search(path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(settings.url, str(path), prefix[1] if prefix else None, progress=False)
    except Exception as error:  # noqa: BLE001 - all that a download may meet
        raise InputError(
            f"encoder {source!r}: cannot be downloaded ({why_not_tensors(error)}); put {settings.url} into "
            f"{path.parent}"
        ) from None
    return path
