"""Files of Hugging Face repositories, through huggingface_hub and its cache.

The user's token comes from HF_TOKEN or ``hf auth login``; HF_ENDPOINT names another hub, HF_HUB_OFFLINE=1 uses the
cache alone.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ca2cl import __version__
from ca2cl.common.arch_names import HUB
from ca2cl.errors import InputError

_SNAPSHOTS = "snapshots"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Repository:
    """A repository at one revision.

    Attributes:
        name: ``ORG/NAME``.
        revision: branch, tag or commit; None for the main branch.
        shown: how the user named it, for messages.
    """

    name: str
    revision: str | None
    shown: str

    def get(self, file: str) -> Path:
        """A file's path in the cache, downloaded where it is not there yet.

        Raises:
            InputError: no such file or repository, no permission, no network, no room, or a broken transfer.
        """
        from huggingface_hub import hf_hub_download

        try:
            path = hf_hub_download(
                self.name,
                file,
                revision=self.revision,
                library_name="ca2cl",
                library_version=__version__,
                endpoint=os.environ.get("HF_ENDPOINT") or None,
            )
        except Exception as error:  # noqa: BLE001 - also of the HTTP library below, which differs between versions
            self._explain(file, error)
        return Path(path)

    def find(self, *files: str) -> Path | None:
        """The first of ``files`` that the repository has; None where it has none of them. Where the hub is out of
        reach, the first that the cache has.

        Raises:
            InputError: see ``get``.
        """
        away: Unreachable | None = None
        for file in files:
            path, absent = self._cached(file)
            if away is not None or absent:  # a miss takes huggingface_hub half a minute of trying
                if path is not None:
                    return path
                continue
            try:
                return self.get(file)
            except Unreachable as error:
                away = error
            except MissingFile:
                continue
        if away is not None:
            raise away
        return None

    def _cached(self, file: str) -> tuple[Path | None, bool]:
        """A file's place in the cache; and whether it is known that this commit has no such file."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.name, file, revision=self.revision)
        is_commit = self.revision is not None and _COMMIT.fullmatch(self.revision) is not None
        return (Path(found), False) if isinstance(found, str) else (None, found is not None and is_commit)

    def _explain(self, file: str, error: Exception) -> NoReturn:
        from huggingface_hub import constants
        from huggingface_hub import errors as kinds

        page = f"{os.environ.get('HF_ENDPOINT') or constants.ENDPOINT}/{self.name}"
        if isinstance(error, kinds.GatedRepoError):
            text = f"gated; accept its terms at {page}, and set HF_TOKEN to a token of that account"
        elif isinstance(error, kinds.RepositoryNotFoundError):
            text = f"no such repository ({page}), or a private one; correct the name, or set HF_TOKEN"
        elif isinstance(error, kinds.RevisionNotFoundError):
            text = f"has no revision {self.revision or 'main'!r}; see {page}/tree/main"
        elif isinstance(error, kinds.LocalEntryNotFoundError):
            raise Unreachable(
                f"encoder {self.shown!r}: {file} is not in the cache, and the hub cannot be reached ({page}); download "
                f"it where there is a network (hf download {self.name}), or unset HF_HUB_OFFLINE"
            ) from None
        elif isinstance(error, kinds.EntryNotFoundError):
            raise MissingFile(f"encoder {self.shown!r}: has no {file}; see {page}/tree/main") from None
        else:
            first = " ".join(str(error).split())[:200] or type(error).__name__
            text = f"{file} cannot be downloaded ({first}); try again, which continues where it broke off"
        raise InputError(f"encoder {self.shown!r}: {text}") from None


class MissingFile(InputError):
    """The repository has no such file."""


class Unreachable(MissingFile):
    """Neither the hub nor the cache has the file; whether the repository does is not known."""


def parse_repository(source: str) -> tuple[Repository, str | None]:
    """Repository and file of ``hf-hub:ORG/NAME[/FILE][@REVISION]``; no file where none is named.

    Raises:
        InputError: of another form.
    """
    path, at, revision = source.removeprefix(HUB).partition("@")
    words = path.split("/", 2)
    if len(words) < 2 or not all(words) or (at and not revision):
        raise InputError(
            f"encoder {source!r}: give {HUB}ORG/NAME, or {HUB}ORG/NAME/FILE, and @REVISION for another one"
        )
    return Repository("/".join(words[:2]), revision or None, source), words[2] if len(words) > 2 else None


def commit_of(path: Path) -> str | None:
    """The commit that a file of the cache is of."""
    parts = path.parts
    return parts[parts.index(_SNAPSHOTS) + 1] if _SNAPSHOTS in parts else None
