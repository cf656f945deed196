"""Job directory: owner record and lock."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ca2cl.common.files import remove_temporaries, write_record, writing
from ca2cl.common.locks import Locked, exclusive_lock
from ca2cl.common.records import parse_json
from ca2cl.errors import InputError

_SHOWN = 4
LOCK_NAME, LOCK_S = ".lock", 120.0
"""A job that is started again may find the one before still ending, or a file server that still holds its lock."""
REMEDY = "give a folder you can write"


def changed(first: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``name old -> new`` of every setting that a job has now and had otherwise. One that it did not have at first is
    of a newer version and has its default."""
    return [f"{name} {first[name]} -> {now[name]}" for name in now if name in first and first[name] != now[name]]


def listed(changes: Sequence[str]) -> str:
    """The first of many, and how many more there are."""
    more = f", and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
    return ", ".join(changes[:_SHOWN]) + more


def job_record(settings: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Record of a job with these settings, and what else it is known by."""
    content = {"settings": dict(settings), **more}
    text = json.dumps(content if more else content["settings"], sort_keys=True)
    return {"digest": hashlib.sha256(text.encode()).hexdigest(), **content}


def _settings_changed(first: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return changed(first["settings"], now["settings"])


@dataclass(frozen=True)
class JobDir:
    """Directory of a job that may be started again."""

    path: Path
    record: str = "job.json"
    """Name of the file that says whose it is."""
    differences: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]] = _settings_changed
    """Lists the differences between the jobs of two records."""
    foreign: tuple[str, ...] = ("[!.]*",)
    """Patterns of what a directory without a record must not hold."""
    setting: str = "output_dir"
    remedy: str = REMEDY
    lock: str = LOCK_NAME
    forks: bool = True
    """True if a killed job's forked workers may outlive it; see ``exclusive_lock``."""
    temporaries: tuple[str, ...] = ()
    """Folders in it that are cleared of half-written files once it is locked."""

    def changes(self, record: Mapping[str, Any]) -> list[str] | None:
        """Differences between the directory's job and this one; None where it is no job's.

        Raises:
            InputError: the record is damaged, or the directory holds something else.
        """
        path = self.path / self.record
        try:
            return self.differences(parse_json(path.read_text(encoding="utf-8")), record)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: damaged ({error!r}); use another {self.setting}") from None
        if any(True for pattern in self.foreign for _ in self.path.glob(pattern)):
            raise InputError(
                f"{self.setting} {str(self.path)!r} is not empty and holds no such job: use another folder"
            )
        return None

    def check(self, record: Mapping[str, Any]) -> bool:
        """True if the directory is this job's already; False where it is no job's.

        Raises:
            InputError: it is another's, or holds something else.
        """
        changes = self.changes(record)
        if changes:
            raise InputError(
                f"{self.setting} {str(self.path)!r} holds another job ({listed(changes)}): use those settings, or "
                "another folder"
            )
        return changes is not None

    def begin(self, record: Mapping[str, Any], held: ExitStack, timeout: float | None = None) -> bool:
        """Lock the directory until ``held`` is closed, and check it; the result and errors are those of both."""
        self.check(record)  # before anything is written to another job's directory
        held.enter_context(self.locked(timeout))
        return self.check(record)  # the job before may just have claimed it

    def write(self, record: Mapping[str, Any]) -> None:
        """Claim the directory, if ``check`` agrees."""
        write_record(self.path / self.record, record, self.remedy)

    def withdraw(self) -> None:
        """Take back the claim of a job that was refused: no record, and no directory if nothing else is in it."""
        (self.path / self.record).unlink(missing_ok=True)
        if [entry.name for entry in self.path.iterdir()] == [self.lock]:
            (self.path / self.lock).unlink()
            self.path.rmdir()

    @contextmanager
    def locked(self, timeout: float | None = None) -> Iterator[None]:
        """Make the directory and keep other jobs out of it; the lock goes with this process, however it ends.

        Args:
            timeout: seconds that another job may take to get out; None: ``LOCK_S``.

        Raises:
            InputError: another job works in it, or it cannot be written.
        """
        timeout = LOCK_S if timeout is None else timeout
        waiting = f"{self.path}: another job is writing here; waiting for it, {timeout:.0f} s at most"
        lock = exclusive_lock(self.path / self.lock, timeout, waiting=waiting, per_process=self.forks)
        with ExitStack() as held:
            try:
                with writing(self.path, self.remedy):
                    held.enter_context(lock)
            except Locked as holder:
                raise InputError(f"{self.path}: another job is writing here; wait for it, or end it{holder}") from None
            for folder in self.temporaries:
                remove_temporaries(self.path / folder, self.remedy)
            yield
