from __future__ import annotations

import pytest
from torch import nn

from vlft import ParamGroup
from vlft.optim import build_optimizer, schedule, set_rates

NAMES = ["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]


@pytest.mark.parametrize("name", NAMES)
def test_no_step_of_a_schedule_is_wasted_at_rate_zero(name: str) -> None:
    factor = schedule(name, 3, 10)
    values = [factor(step) for step in range(10)]
    assert all(0 < v <= 1 for v in values)
    if name != "constant":
        assert values[0] == pytest.approx(1 / 3)
    assert values[2] == pytest.approx(1)


def test_cosine_falls_to_almost_nothing() -> None:
    factor = schedule("cosine", 0, 100)
    assert factor(99) < 1e-3
    assert factor(50) == pytest.approx(0.5, abs=0.02)


def test_rates_follow_the_part_and_decay_spares_vectors() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "head": nn.Linear(2, 2, bias=False)})
    groups = [
        ParamGroup("a", ("a.weight", "a.bias"), "llm"),
        ParamGroup("b", ("b.weight",), "vit", lr_scale=0.5, weight_decay=0.2),
        ParamGroup("head", ("head.weight",), "head"),
    ]
    optimizer = build_optimizer(model, groups, {"llm": 1e-3, "vit": 1e-2}, 0.1)
    found = {g["name"]: (g["names"], g["peak_lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert found == {
        "a": (["a.weight"], 1e-3, 0.1),
        "a/no_decay": (["a.bias"], 1e-3, 0.0),
        "b": (["b.weight"], 5e-3, 0.2),
        "head": (["head.weight"], 1e-3, 0.1),
    }
    assert set_rates(optimizer, 0.5) == {"llm": 5e-4, "vit": 2.5e-3, "head": 5e-4}
