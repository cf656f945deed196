"""The configuration refuses what cannot work, in one line that names field, value and remedy."""

import dataclasses

import pytest
from annotated_types import Ge, Interval

from ca2cl import config as c
from ca2cl.errors import InputError
from ca2cl.pretrain.config import PretrainConfig


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [
        (c.DataConfig, "image_size", 8),
        (c.DataConfig, "lanes", 0),
        (c.DataConfig, "max_bad_rate", 1.5),
        (c.ModelConfig, "std", (0.2, 0.0, 0.2)),
        (c.ViewsConfig, "crop_scale", (0.5, 0.2)),
        (c.ObjectiveConfig, "temperature", 0.0),
        (c.ObjectiveConfig, "clusters", 1),
        (c.OptimConfig, "lr", -1.0),
        (c.OptimConfig, "lr", float("nan")),
        (c.OptimConfig, "momentum", 1.0),
        (c.OptimConfig, "clip_norm", 0.0),
        (c.RunConfig, "batch_size", 1),
        (c.RunConfig, "epochs", 0),
        (c.RunConfig, "seed", -1),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(group: type, field: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"\.{field} is .*: use ") as caught:
        group(**{field: value})
    assert "\n" not in str(caught.value)


def test_a_range_is_told_in_words_and_none_is_in_any() -> None:
    config = c.RunConfig()
    c.check_ranges(config, micro_batch_size=Ge(2), seed=Interval(ge=0, le=0), batch_size=Interval(gt=255, lt=257))
    with pytest.raises(InputError, match="^run.batch_size is 256: use more than 0, below 256$"):
        c.check_ranges(config, "run", batch_size=Interval(gt=0, lt=256))


def test_a_batch_that_lanes_do_not_divide_is_refused_with_a_lane_count_that_works() -> None:
    with pytest.raises(InputError, match=r"--data.lanes 4"):
        PretrainConfig(run=c.RunConfig(batch_size=20), data=c.DataConfig(lanes=8))


@dataclasses.dataclass
class Pinned:
    rate: float = 0.1
    sides: tuple[int, ...] = (48, 96)
    name: str | None = None


def test_the_digest_is_frozen() -> None:
    """Another process, and another version, must find the same: work is known again by it."""
    assert c.digest(Pinned()) == "3caf9a2431a56ce5564505b555e5a6d36091f7379a3540cdda5c3e20e0d142f6"
    assert c.digest(Pinned(rate=0.2)) != c.digest(Pinned())


def test_flattened_names_are_the_command_lines() -> None:
    flat = c.flatten(PretrainConfig(model=c.ModelConfig(mean=c.IMAGENET_MEAN)))
    assert flat["objective.temperature"] == 0.2
    assert flat["model.mean"] == "[0.485, 0.456, 0.406]"
    groups = {f.name for f in dataclasses.fields(PretrainConfig)}
    assert {name.split(".")[0] for name in flat} == groups
