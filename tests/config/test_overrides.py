"""The overrides of the command line are compared with the schema before anything is composed."""

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
    "a deleted section in a section": ("~logging.wandb", "a section cannot be deleted", "logging.wandb.mode=VALUE"),
    "a deleted group without a default": ("~experiment", "a group cannot be deleted", "leave it out"),
    "a deleted nothing": ("~", "cannot be read", "key=value"),
    "a deleted unknown key": ("~checkpoint.kep", "unknown key checkpoint.kep", "checkpoint.keep"),
    "an added key": ("+model.depth=3", "unknown key model.depth", "did you mean"),
    "an added key by force": ("++train.sed=3", "unknown key train.sed", "train.seed"),
    "an added key that is there": ("+train.seed=3", "train.seed is there already", "write train.seed=3"),
    "an added option of a group": ("+model=850m", "model is there already", "write model=850m"),
    "an added option by force": ("++model=850m", "model is there already", "write model=850m"),
    "an added setting of Hydra's": ("+hydra.verbose=true", "no settings of Hydra", "leave it out"),
    "another sweeper": ("hydra/sweeper=basic", "no settings of Hydra", "leave it out"),
    "no option of a group": ("model=null", "model/null does not exist", "850m"),
    "a recipe of monet-data": ("+data_prep=starcoder", "unknown key data_prep", "did you mean data?"),
    "a setting of Hydra's": ("hydra.run.dir=elsewhere", "no settings of Hydra", "run.dir"),
    "a group in another place": ("model@here=nano", "a group has one place", "model=OPTION"),
    "a key without a value": ("train.seed", "cannot be read", "key=value"),
    "nothing but a value": ("=1", "=1 cannot be read", "key=value"),
    "a special character": ("data.path=/a=b", "cannot be read", """'data.path="/a=b"'"""),
    "an option that is not there": ("--unknown", "is not an option of monet-train", "--help"),
    "several values without -m": ("optimizer.lr=1e-3,2e-3", "several values", "add -m"),
    "a section as a value": ("train=3", "train is a section", "train.seed=VALUE"),
    "a text for a number": ("optimizer.lr=high", "optimizer.lr=high", "number"),
    "a list of texts for numbers": ("data.weights=[a,b]", "data.weights=[a, b]", "a list of numbers or null"),
    "null for a number": ("train.seed=null", "train.seed=null", "not a whole number"),
    "a broken number in a section": ("train={seed: one}", "train.seed=one", "not a whole number"),
    "a reference to nothing": ("optimizer.lr=${rate}", "optimizer.lr", "'rate' not found"),
    "a reference to a text": ("optimizer.lr=${run.name}", "optimizer.lr", "'nano'"),
    "an unknown key in a section": ("optimizer={lrr: 1}", "unknown key optimizer.lrr", "optimizer.lr"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_its_remedy(case: str) -> None:
    override, *said = REFUSED[case]
    with pytest.raises(UserError) as refused:
        compose(["data.path=shards", override])
    for words in said:
        assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_key_that_is_there_may_be_forced() -> None:
    assert compose(["data.path=shards", "++train.seed=3"]).train.seed == 3


def test_sections_may_be_given_whole() -> None:
    config = compose(["data.path=shards", "optimizer={lr: 3e-3, clip: 2}"])
    assert (config.optimizer.lr, config.optimizer.clip, config.optimizer.eps) == (3e-3, 2.0, 1e-8)
