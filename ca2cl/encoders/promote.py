"""``ca2cl encoders promote``: set an alias, optionally only if better."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from ca2cl.config import TrackingConfig
from ca2cl.errors import InputError, nearest
from ca2cl.registry.downstream import Downstream, Terms, falls, is_named, newest_by_terms, runs_for, spellings
from ca2cl.registry.register import CHAMPION
from ca2cl.registry.versions import LATEST, EncoderVersion, find_version, needed_store, registered
from ca2cl.store.open import Store, store_errors

POSITIONAL = ("what",)
EXIT_KEPT = 3
_ALIAS = re.compile(r"[A-Za-z][\w-]*")
_VERSION_LIKE = re.compile(r"v\d+", re.I)  # MLflow keeps these for itself


@dataclass(frozen=True, kw_only=True)
class PromoteConfig:
    """Move an alias to an encoder; with --if_better only if the encoder is better.

    Better means that the metric is strictly better in every kind of downstream run that both encoders have on the same
    training and test shards (the newest run of each, with the honest protocol and without leakage). If there is no such
    run, the command ends with an error and the alias is not moved. The line on stdout begins with "promoted" or "kept".
    See also --exit_code.
    """

    what: str
    """Version number, alias, models:/NAME/VERSION, models:/NAME@ALIAS, or id of the source run."""
    alias: str = CHAMPION
    """Alias to move; an alias that no encoder has is set without a comparison."""
    if_better: str | None = None
    """Metric that must be better than the holder's: a full name, or the unique end of one, such as
    linear/100pct/macro_f1. Lower is better if the name contains loss, error, brier or hausdorff, otherwise
    higher."""
    than: str | None = None
    """Alias whose holder must be beaten; none: the alias that is moved."""
    exit_code: bool = False
    """End with exit code 3 instead of 0 if the alias was not moved because its holder was not beaten."""
    name: str | None = None
    """Registered model of a bare number or alias; none: ca2cl-encoder, or the only other model that has it."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow store of the encoders."""

    def __post_init__(self) -> None:
        if self.alias == LATEST:
            raise InputError("alias is 'latest': that is MLflow's own, always the newest version; use another")
        if not _ALIAS.fullmatch(self.alias) or _VERSION_LIKE.fullmatch(self.alias):
            raise InputError(
                f"alias is {self.alias!r}: use letters, digits, - and _ after a letter, and nothing like v1"
            )
        if self.than is not None and self.if_better is None:
            raise InputError(f"than is {self.than!r}: needs if_better, the metric to compare by")


def run(config: PromoteConfig) -> int:
    """Move the alias, or print why not. Returns the exit code.

    Raises:
        InputError: unknown encoder, alias or metric, a run that was never registered, or nothing to compare.
    """
    store = needed_store(config.tracking)
    entry = find_version(store, config.what, config.name)
    if not entry.version:
        raise InputError(f"run {entry.run_id!r}: is no registered version; run `ca2cl encoders import {entry.run_id}`")
    holder = _holder(store, entry.name, config.alias)
    if holder == entry:
        sys.stdout.write(f"kept: {entry.label} is {config.alias} already\n")
        return 0
    rival = find_version(store, f"models:/{entry.name}@{config.than}") if config.than else holder
    reasons = ""
    if config.if_better and rival and rival != entry:
        better, reasons = _verdict(store, entry, rival, config.if_better)
        if not better:
            sys.stdout.write(f"kept: {config.alias} stays with {holder.label if holder else 'nobody'}{reasons}\n")
            return EXIT_KEPT if config.exit_code else 0
    with store_errors(store.uri):
        store.client.set_registered_model_alias(entry.name, config.alias, entry.version)
    before = f"before {holder.label}" if holder else "nobody had it"
    sys.stdout.write(f"promoted: {entry.label} is {config.alias} now ({before}){reasons}\n")
    return 0


def _holder(store: Store, name: str, alias: str) -> EncoderVersion | None:
    return next((entry for entry in registered(store, name) if alias in entry.aliases), None)


def _verdict(store: Store, entry: EncoderVersion, rival: EncoderVersion, wanted: str) -> tuple[bool, str]:
    """True if ``entry`` beats ``rival`` wherever both were measured, and both numbers in words.

    Raises:
        InputError: no comparable run has such a metric, or the name fits several.
    """
    ours, theirs = (newest_by_terms(runs_for(store, one)) for one in (entry, rival))
    both = [terms for terms in ours if terms in theirs]
    shared = [terms for terms in both if terms.rank]
    if both and not shared:
        leak = both[0].leak
        how = f"with a leak ({leak})" if leak else f"by protocol {both[0].protocol}"
        remedy = "on slides that neither has seen" if leak else "on tissue and without --protocol"
        raise InputError(
            f"{entry.label} and {rival.label}: both were measured {how} alone, and no encoder is promoted by that; "
            f"measure both {remedy}, or promote without --if_better"
        )
    if not shared:
        raise InputError(
            f"{entry.label} and {rival.label}: nothing is comparable, {entry.label} has {_listed(ours)} and "
            f"{rival.label} has {_listed(theirs)}; measure both on the same shards, or promote without --if_better"
        )
    metric = _metric(wanted, [ours[terms].scores().keys() & theirs[terms].scores().keys() for terms in shared])
    better, lines = True, []
    for terms in shared:
        new, old = ours[terms].scores().get(metric), theirs[terms].scores().get(metric)
        if new is None or old is None:
            continue
        better = better and (new < old if falls(metric) else new > old)
        lines.append(f"\n  {metric} ({terms}): {entry.label} {new:.6g}, {rival.label} {old:.6g}")
    return better, "".join(lines)


def _listed(newest: Mapping[Terms, Downstream]) -> str:
    return "; ".join(str(terms) for terms in newest) or "no downstream run"


def _metric(wanted: str, common: list[set[str]]) -> str:
    known = sorted(set().union(*common))
    found = [name for name in known if name == wanted] or [name for name in known if is_named(name, wanted)]
    if not found:
        raise InputError(f"if_better is {wanted!r}: no metric that both have; {nearest(wanted, spellings(known))}")
    if len(found) > 1:
        raise InputError(f"if_better is {wanted!r}: fits {len(found)} metrics ({', '.join(found)}); give one")
    return found[0]
