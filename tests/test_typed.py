"""Checked data classes: what the reader and the walker of bounds refuse, and what they say."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from monet_train.errors import UserError
from monet_train.model.config import MonetConfig
from monet_train.typed import above, at_least, bounded, check_bounds, describe, from_json, not_empty, one_of, share


@dataclass
class Inner:
    ratio: float = share(0.5, of="the whole")
    mode: str = one_of("on", "off", default="on")


@dataclass
class Outer:
    count: int | None = at_least(1, default=None)
    rate: float = above(0, default=1.0, remedy="as 1e-8")
    name: str = not_empty("x")
    pair: list[float] = bounded(lambda pair: len(pair) == 2, "must be two numbers", default=(0.0, 1.0))
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"count": 0}, "x.count=0 must be a number of at least 1"),
        ({"rate": math.nan}, "x.rate=nan must be a number above 0; as 1e-8"),
        ({"rate": math.inf}, "x.rate=inf must be a number above 0; as 1e-8"),
        ({"rate": "fast"}, "x.rate=fast must be a number above 0; as 1e-8"),
        ({"name": " "}, "x.name=  is empty; give a value"),
        ({"pair": [1.0]}, "x.pair=[1.0] must be two numbers"),
        ({"inner": Inner(ratio=1.5)}, "x.inner.ratio=1.5 must be at least 0 and at most 1: a share of the whole"),
        ({"inner": Inner(mode="?")}, "x.inner.mode=? is unknown; use one of on, off"),
    ],
)
def test_a_value_out_of_bounds_is_one_line(values: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as refusal:
        check_bounds(Outer(**values), "x.")
    assert str(refusal.value) == line


def test_values_within_bounds() -> None:
    check_bounds(Outer())
    check_bounds(Outer(count=1, inner=Inner(ratio=1)))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"count": "5"}, '`x.count` is "5", not a whole number'),
        ({"count": -5}, "`x.count` is negative"),
        ({"rate": True}, "`x.rate` is true, not a number"),
        ({"inner": []}, "`x.inner` is [], not an object with named values"),
        ({"inner": {"mod": "on"}}, "`x.inner` has the unknown field 'mod'; did you mean mode?"),
        ({"pair": [1, "a"]}, '`x.pair[1]` is "a", not a number'),
    ],
)
def test_a_json_value_of_another_type_is_named(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError) as refusal:
        from_json(Outer, values, "x")
    assert str(refusal.value) == line


def test_a_whole_number_is_a_number() -> None:
    read = from_json(Outer, {"rate": 2, "inner": {"ratio": 0}}, "x")
    assert (read.rate, type(read.rate), read.inner.ratio) == (2.0, float, 0.0)


def test_types_in_plain_words() -> None:
    assert describe(int | None) == "a whole number or null"
    assert describe(list[float] | None) == "a list of numbers or null"


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({"moe_dim": "12"}, ["config.moe_dim", '"12"', "not a whole number"]),
        ({"hidden_size": 1536.0}, ["config.hidden_size", "1536.0", "not a whole number"]),
        ({"moe_experts": 0}, ["model.moe_experts=0", "at least 1"]),
        ({"rope_theta": "1e4"}, ["config.rope_theta", "not a number"]),
    ],
)
def test_an_architecture_of_wrong_values_is_refused(values: dict[str, Any], fragments: list[str]) -> None:
    """In the ``config.json`` of a checkpoint, which other tools also write."""
    with pytest.raises(UserError) as refusal:
        MonetConfig.from_dict(values)
    for fragment in fragments:
        assert fragment in str(refusal.value)


def test_an_architecture_is_read_with_what_others_add() -> None:
    config = MonetConfig.from_dict({"rope_theta": 10000, "moe_dim": None, "architectures": ["MonetForCausalLM"]})
    assert config == MonetConfig()
