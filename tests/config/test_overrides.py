"""What stands on the command line is held against the schema before anything is composed."""

from __future__ import annotations

import pytest

from monet_train.config.compose import compose
from monet_train.errors import UserError

# override, and what the line must say: what is wrong and the remedy
REFUSED = {
    "a deleted key": ("~checkpoint.keep", "a key cannot be deleted", "checkpoint.keep=null"),
    "a deleted key with its value": ("~checkpoint.keep=3", "a key cannot be deleted", "checkpoint.keep=null"),
    "a deleted key that cannot be null": ("~train.seed", "a key cannot be deleted", "train.seed=0"),
    "a deleted section": ("~train", "a section cannot be deleted", "set its keys instead"),
    "a deleted group": ("~zero", "a group cannot be deleted", "zero=stage0|stage1"),
    "a deleted unknown key": ("~checkpoint.kep", "unknown key checkpoint.kep", "checkpoint.keep"),
    "an added key": ("+model.depth=3", "unknown key model.depth", "did you mean"),
    "an added key by force": ("++train.sed=3", "unknown key train.sed", "train.seed"),
    "an added key that is there": ("+train.seed=3", "train.seed is there already", "write train.seed=3"),
    "a setting of Hydra's": ("hydra.run.dir=elsewhere", "no settings of Hydra's", "run.dir"),
    "a group in another place": ("model@here=nano", "a group has one place", "model=OPTION"),
    "a key without a value": ("train.seed", "cannot be read", "key=value"),
    "an option that is not there": ("--unknown", "is not an option of monet-train", "--help"),
    "several values without -m": ("optimizer.lr=1e-3,2e-3", "several values", "add -m"),
    "a section as a value": ("train=3", "train is a section", "train.seed=VALUE"),
    "a text for a number": ("optimizer.lr=high", "optimizer.lr=high", "number"),
    "an unknown key in a section": ("optimizer={lrr: 1}", "unknown key optimizer.lrr", "optimizer.lr"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_its_remedy(case: str) -> None:
    override, *said = REFUSED[case]
    with pytest.raises(UserError) as refused:
        compose(["data.path=shards", override])
    for words in said:
        assert words in str(refused.value)


def test_a_key_that_is_there_may_be_forced() -> None:
    assert compose(["data.path=shards", "++train.seed=3"]).train.seed == 3
