"""What is said about the method's authors' runs holds for the settings that stand beside it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from ca2cl.cli.parser import parse
from ca2cl.config import OptimConfig, flatten
from ca2cl.errors import InputError
from ca2cl.evaluation.finetune.config import FinetuneConfig, Trains
from ca2cl.evaluation.finetune.original import (
    ALWAYS,
    THEIRS,
    differences,
    draw_original,
    epochs_of,
    protocol_of,
    settled,
    validation,
)
from ca2cl.evaluation.finetune.run import _starts
from ca2cl.evaluation.finetune.step import build_augmentation
from ca2cl.evaluation.finetune.trial import build_network, preprocessing_of
from ca2cl.evaluation.labelled import LabelledOrder
from ca2cl.pretrain.shares import lane_groups
from ca2cl.reproduce.config import NctConfig, tuning
from ca2cl.reproduce.config import settled as settled_nct
from ca2cl.reproduce.table import notes
from ca2cl.training.optim import build_optimizer
from ca2cl.training.schedule import learning_rate
from ca2cl.views.paper import STRONG

BUDGETS = (0.01, 0.1, 0.5, 1.0)
# Settings of which the list says nothing: the job's data, encoders and place, how many seeds and processes; the size in
# pixels stands in the table's own line, the protocol is what the list is about, fine-tuning refuses an
# average, and steps are frozen only with layers.
ELSEWHERE = {
    "encoder", "train", "test", "output_dir", "against", "labels", "seeds", "draw_by", "trains", "protocol",
    "note_protocol", "image_size", "details", "workers", "cache_dir", "optim.ema",
    "optim.freeze_steps",
}  # fmt: skip
UNUSED: dict[Trains, set[str]] = {"all": set(), "head": {"held_out", "patience"}}
"""The test tiles choose the head's epoch."""
BOTH: Any = pytest.mark.parametrize("trains", ["all", "head"])


def config(trains: Trains, **given: Any) -> FinetuneConfig:
    return FinetuneConfig(
        encoder="random:3", train="a", test="b", output_dir="c", protocol="original", trains=trains, labels=BUDGETS,
        **given,
    )  # fmt: skip


def test_as_many_labels_are_drawn_as_the_authors_draw_and_from_their_share() -> None:
    for trains, counts, split in (("all", [800, 8_000, 40_000, 80_000], 20_000), ("head", [1_000, 10_000], 0)):
        how = settled(config(trains))  # type: ignore[arg-type]
        protocol, share = protocol_of(how), how.held_out or 0.0
        drawn = draw_original(protocol, 100_000, BUDGETS[: len(counts)], 2, share)
        assert [len(draws[0]) for draws in drawn.values()] == counts
        for seed, rows in enumerate(drawn[0.1]):
            held = validation(protocol, 100_000, share, seed)
            assert held.sum() == split and not held[rows].any()
            expected = (100_000 - split) * (1 - np.exp(-0.1))  # distinct tiles of a draw with replacement
            assert len(np.unique(rows)) == pytest.approx(expected, rel=0.01)
        assert not np.array_equal(*drawn[0.1])
        # whatever the class: counts of nine classes vary from draw to draw as independent draws do
        assert np.bincount(drawn[0.1][0] % 9).std() > 5


@BOTH
def test_a_job_with_nothing_given_is_theirs(trains: Trains) -> None:
    how = config(trains)
    assert differences(how) == []
    start = _starts(replace(how, against=()))["encoder"]
    how = settled(how)
    epochs = [epochs_of(how, budget) for budget in BUDGETS]
    assert epochs == ([40, 40, 10, 10] if trains == "all" else [100] * 4)
    assert (how.batch_size, how.min_steps, how.micro_batch_size) == (128, 1, None)
    if trains == "all":
        assert (how.held_out, how.patience) == (0.2, 5)
    network = build_network(how, start, 0, 9)
    (group,) = build_optimizer(how.optim, network).param_groups
    assert group["lr"] == (3e-4 if trains == "all" else 0.01)
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 0.0, False)
    trained = 62 if trains == "all" else 2  # tensors of a ResNet-18 with its head
    assert len(group["params"]) == trained
    bound = 1 / network.head.in_features**0.5  # nn.Linear's own start
    assert bound * 0.99 < network.head.weight.abs().max() <= bound


def test_the_rate_is_the_one_in_their_logs() -> None:
    """``lr`` after epochs 0, 1 and 4 of logs/NCT/fine_tuning, from a cosine to 4e-8 where ours goes to 0."""
    optim = settled(config("all")).optim
    rates = [learning_rate(optim, epoch * 7, 280, 7) for epoch in (1, 2, 5)]
    assert rates == pytest.approx([0.00027135636881635457, 0.0001963663688163546, 0.0003], abs=4e-8)


def test_their_augmentation_is_the_strong_view_with_more_distortion() -> None:
    how = settled(replace(config("all"), against=()))
    start = _starts(how)["encoder"]
    made = build_augmentation(how.augment, preprocessing_of(how, start), 0)
    views = made.__self__
    assert made.__name__ == "strong" and views.recipe.likely["strong"] == replace(STRONG, distortion=0.7)
    tiles = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    assert made(tiles, torch.arange(4), 0).shape == (4, 3, start.card.input_size, start.card.input_size)


def test_no_augmentation_can_be_asked_for() -> None:
    """``none`` is the word for a setting that is left open, too."""
    words = ["--encoder", "random:3", "--train", "a", "--test", "b", "--output_dir", "c"]
    for protocol, usual in (("honest", "crop"), ("original", "strong")):
        for given, expected in (([], usual), (["--augment", "none"], "none"), (["--augment", "auto"], usual)):
            found = parse("finetune", [*words, "--protocol", protocol, *given])
            assert settled(found).augment == expected
    found = parse("reproduce nct", ["--encoder", "random", "--data", "d", "--augment", "none"])
    assert settled(tuning(found)).augment == "none"


@BOTH
def test_every_setting_is_held_against_theirs_or_is_known_not_to_be(trains: Trains) -> None:
    """A setting that is new must be decided about: is it theirs, or does it change nothing of theirs?"""
    named = {name for name in flatten(config(trains)) if not name.startswith("tracking.")}
    assert named == set(THEIRS[trains]) | UNUSED[trains] | ELSEWHERE | {"epochs"}


CHANGES: dict[str, Any] = {
    "epochs": 3, "min_steps": 200, "batch_size": 64, "micro_batch_size": 32, "held_out": 0.1, "patience": 9,
    "norm": "frozen", "augment": "crop", "precision": "fp16",
    "optim": {
        "name": "adam", "lr": 0.5, "weight_decay": 0.01, "momentum": 0.5, "schedule": "constant", "restart_epochs": 4,
        "warmup_steps": 3, "clip_norm": 1.0, "layer_decay": 0.8, "decay_all": False, "freeze_layers": 2,
    },
}  # fmt: skip


def changed(trains: Trains) -> list[tuple[str, FinetuneConfig]]:
    optim = CHANGES["optim"]
    assert set(optim) == {field.name for field in fields(OptimConfig)} - {"ema", "freeze_steps"}
    flat = [(name, config(trains, **{name: value})) for name, value in CHANGES.items() if name != "optim"]
    optims = {
        name: replace(config(trains).optim, **{name: value}, freeze_steps=int(name == "freeze_layers"))
        for name, value in optim.items()
    }
    return flat + [(f"optim.{name}", replace(config(trains), optim=one)) for name, one in optims.items()]


@BOTH
def test_changing_any_setting_is_told(trains: Trains) -> None:
    found = changed(trains)
    assert {name for name, _ in found} - UNUSED[trains] == set(THEIRS[trains]) | {"epochs"}
    for name, job in found:
        told = differences(job)
        if name in UNUSED[trains]:
            assert told == []
        else:
            assert len(told) == 1 and told[0].startswith(f"{name} ") and ", theirs " in told[0], (name, told)


def test_the_table_says_what_differs_of_both_tasks() -> None:
    facts = {"arch": "resnet18", "image_size": 224, "tiles": [100_000, 7180], "test_tiles_published": 7180,
             "leak": {"same_manifest": False, "equal_test_tiles": 0}}  # fmt: skip

    def said(**given: Any) -> dict[str, str]:
        job = settled_nct(NctConfig(encoder="random", data="d", protocol="original", **given))
        mark = ", what still differs from the authors' code: "
        lines = [note.partition(mark) for note in notes(job, facts, made_up=False)]
        return {task: told for task, found, told in lines if found}

    assert said() == {"linear probe": "; ".join(ALWAYS), "fine-tuning": "; ".join(ALWAYS)}
    told = said(batch_size=32, epochs=10, tasks=("finetune",))
    assert told["fine-tuning"].startswith("batch_size 32, theirs 128; epochs 10, theirs 40 at 1 %, 40 at 10 %; ")
    assert list(told) == ["fine-tuning"]
    job = tuning(settled_nct(NctConfig(encoder="random", data="d", protocol="original")), "head")
    assert (job.trains, job.epochs, job.labels) == ("head", None, BUDGETS)
    honest = notes(settled_nct(NctConfig(encoder="random", data="d")), facts, made_up=False)
    assert not [note for note in honest if "still differs" in note]


def test_a_share_of_the_labels_is_all_that_the_original_protocol_draws() -> None:
    with pytest.raises(InputError, match="protocol original draws a share of the labels"):
        replace(config("all"), labels=(20.0,))


@pytest.mark.parametrize(("count", "whole", "all_of_them"), [(800, 6, 7), (8_000, 62, 63), (80_000, 625, 625)])
def test_an_epoch_ends_with_a_smaller_batch_as_theirs(count: int, whole: int, all_of_them: int) -> None:
    """Their logs count 7, 63 and 625 batches of 128."""
    rows = np.arange(count)
    assert LabelledOrder(rows, 128, 0).steps_per_epoch == whole
    order = LabelledOrder(rows, 128, 0, fewest=2)
    assert order.steps_per_epoch == all_of_them
    seen = np.concatenate([order.samples_N[places] for places in order.batches(range(all_of_them, 2 * all_of_them))])
    assert np.array_equal(np.sort(seen), rows) and np.array_equal(seen, order.permuted(1))
    (next_places,) = order.batches(range(all_of_them, all_of_them + 1))
    assert np.array_equal(order.samples_N[next_places], seen[:128])


def test_groups_of_896_tiles_are_both_views_and_fit_one_process_and_two() -> None:
    """README and the recipe name them as the authors' BatchNorm, which saw both views of a GPU's half of the batch."""
    settings = ["--model.norm", "lane_group", "--model.norm_group", "896", "--model.norm_block", "1"]
    config = parse("pretrain", ["--recipe", "nct_resnet18", *settings])
    groups = lane_groups(config, 1, config.run.batch_size)
    assert groups is not None and torch.equal(groups.second_order(1792), torch.arange(1792))
    assert config.run.batch_size // 2 == config.model.norm_group
    groups.check(2, config.run.batch_size // 2)
    with pytest.raises(InputError, match="blocks of 1 groups, 896 tiles"):
        groups.check(4, config.run.batch_size // 4)
