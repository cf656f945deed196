"""Downstream results of an encoder, from the runs that name it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ca2cl.common.tables import short
from ca2cl.registry.evaluation_run import LEAK_TAG, SOURCE_RUN_TAG, TOKENS_TAG, TRAINED_ON_TEST
from ca2cl.registry.versions import EncoderVersion
from ca2cl.store.open import Store, all_pages, store_errors

_OWN = "encoder/"
_SPREADS = ("_sd", "_low", "_high")  # of a metric over seeds, and its interval: shown with it, never ranked
_FALLING = ("loss", "error", "brier", "hausdorff")
HONEST = "honest"


class Terms(NamedTuple):
    """Properties that two runs must share for their metrics of one name to be comparable. Budgets are in the names."""

    kind: str
    train: str | None
    test: str | None
    protocol: str = HONEST
    """Data that the evaluation was allowed to see. Numbers of another protocol than the honest one say nothing about
    new tiles: they rank no encoder."""
    leak: str = ""
    """Overlap of the test set with the training data, such as slides; empty where none is known."""
    tokens: str = ""
    """Tokens of a ViT that the features were made of; empty for each encoder's own pooling."""

    @property
    def rank(self) -> bool:
        """True if numbers measured on these terms may rank encoders."""
        return self.protocol == HONEST and not self.leak

    def as_dict(self) -> dict[str, str | None]:
        """For JSON."""
        return {
            "kind": self.kind,
            "train_manifest_digest": self.train,
            "test_manifest_digest": self.test,
            "protocol": self.protocol,
            "leak": self.leak or None,
            "tokens": self.tokens or None,
        }

    def __str__(self) -> str:
        tokens = f", tokens {self.tokens}" if self.tokens else ""
        protocol = "" if self.protocol == HONEST else f", protocol {self.protocol}"
        leak = f", LEAK ({self.leak})" if self.leak else ""
        return f"{self.kind}, train {short(self.train)}, test {short(self.test)}{tokens}{protocol}{leak}"


@dataclass(frozen=True)
class Downstream:
    """A finished run that used an encoder."""

    run_id: str
    terms: Terms
    ended: int | None
    """Milliseconds since 1970."""
    source_run_id: str
    encoder_uri: str
    metrics: Mapping[str, float]
    """Of the encoder alone, without the floors that were measured beside it."""
    params: Mapping[str, str]

    def scores(self) -> dict[str, float]:
        """The metrics without their spreads."""
        return {name: value for name, value in self.metrics.items() if not name.endswith(_SPREADS)}

    def shown(self, name: str) -> str:
        """A metric as text, with its standard deviation over seeds if there is one."""
        if name not in self.metrics:
            return "-"
        spread = self.metrics.get(f"{name}_sd")
        return f"{self.metrics[name]:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")


def downstream_runs(store: Store, source_run_id: str | None = None) -> dict[str, list[Downstream]]:
    """Finished downstream runs by the run that their encoder came from, newest first.

    Args:
        source_run_id: only those of this one.
    """
    wanted = f"= '{source_run_id}'" if source_run_id else "LIKE '_%'"
    grouped: dict[str, list[Downstream]] = defaultdict(list)
    with store_errors(store.uri):
        experiments = [one.experiment_id for one in all_pages(store.client.search_experiments)]
        finished = f"tags.`{SOURCE_RUN_TAG}` {wanted} and attributes.status = 'FINISHED'"
        # MLflow refuses a search in no experiment at all
        for run in all_pages(store.client.search_runs, experiments, finished) if experiments else ():
            made = _downstream(run)
            grouped[made.source_run_id].append(made)
    for runs in grouped.values():
        runs.sort(key=lambda run: run.ended or 0, reverse=True)
    return grouped


def _downstream(run: Any) -> Downstream:
    tags, params = run.data.tags, run.data.params
    name = tags.get("mlflow.runName", "evaluation")
    # The tag is the protocol's name, or its statement, "protocol NAME: what that means".
    protocol = tags.get("ca2cl.protocol", "").removeprefix("protocol ").partition(":")[0].strip()
    terms = Terms(
        tags.get("ca2cl.kind", name),
        tags.get("ca2cl.train_manifest_digest"),
        tags.get("ca2cl.test_manifest_digest"),
        protocol or HONEST,
        tags.get(LEAK_TAG, ""),
        tags.get(TOKENS_TAG, ""),
    )
    # A run with floors has the encoder's metrics under a prefix of their own.
    own = {name: value for name, value in run.data.metrics.items() if name.startswith(_OWN)}
    metrics = own or dict(run.data.metrics)
    uri = params.get("encoder_uri", "")
    return Downstream(run.info.run_id, terms, run.info.end_time, tags[SOURCE_RUN_TAG], uri, metrics, params)


def runs_of(entry: EncoderVersion, grouped: Mapping[str, Sequence[Downstream]]) -> list[Downstream]:
    """The downstream runs of one encoder, newest first.

    A run that was trained further has several versions: what was measured with another one of them is left out. A test
    on the very shards that the encoder was trained on is a leak, whether its run says so or not.
    """
    runs = [run for source in entry.source_run_ids for run in grouped.get(source, ())]
    siblings = f"models:/{entry.name}/"
    runs = [run for run in runs if not run.encoder_uri.startswith(siblings) or run.encoder_uri == entry.uri]
    trained = entry.tag("ca2cl.manifest_digest")
    for place, run in enumerate(runs):
        if trained and run.terms.test == trained and not run.terms.leak:
            runs[place] = replace(run, terms=run.terms._replace(leak=TRAINED_ON_TEST))
    return sorted(runs, key=lambda run: run.ended or 0, reverse=True)


def runs_for(store: Store, entry: EncoderVersion) -> list[Downstream]:
    """``runs_of`` one encoder, asked of the store for it alone.

    Raises:
        InputError: the store cannot be reached.
    """
    grouped: dict[str, list[Downstream]] = {}
    for source in entry.source_run_ids:
        grouped |= downstream_runs(store, source)
    return runs_of(entry, grouped)


def newest_by_terms(runs: Iterable[Downstream]) -> dict[Terms, Downstream]:
    """The newest run of every terms; ``runs`` come newest first."""
    newest: dict[Terms, Downstream] = {}
    for run in runs:
        newest.setdefault(run.terms, run)
    return newest


def is_named(metric: str, wanted: str) -> bool:
    """True if ``wanted`` is the metric's name or the end of it: accuracy, linear/100pct/accuracy."""
    return metric == wanted or metric.endswith(f"/{wanted}")


def spellings(metrics: Iterable[str]) -> list[str]:
    """Every ``wanted`` that ``is_named`` would take, the short ones first."""
    parts = [name.split("/") for name in metrics]
    found = {"/".join(words[start:]) for words in parts for start in range(len(words))}
    return sorted(found, key=lambda name: (name.count("/"), name))


def falls(metric: str) -> bool:
    """True if a lower value is better."""
    return any(word in metric.rpartition("/")[2] for word in _FALLING)


def best(runs: Iterable[Downstream], wanted: str) -> tuple[float, str, Downstream] | None:
    """The best value of the metrics named ``wanted`` in any run that ranks, with its full name and its run."""
    ranking = [run for run in runs if run.terms.rank]
    found = [(value, name, run) for run in ranking for name, value in run.scores().items() if is_named(name, wanted)]
    if not found:
        return None
    choose = min if falls(wanted) else max
    return choose(found, key=lambda one: one[0])
