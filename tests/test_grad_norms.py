"""The gradient's norm by parts: the same under every engine, and the whole one as torch's own clipping gives it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from runs import CPU_ADAM, FSDP_ON_CPU, command, distance, final_weights, metrics, start, train, write_data

from vlft.engine import Engine
from vlft.engine.base import norms_of
from vlft.engine.zero import completed, read_config
from vlft.engine.zero_sums import can_reduce_slices
from vlft.optim import scales_gradients

PARTS = {"vit", "projector", "llm", "head"}


def words(model: Path, registry: Path, out: Path, **more: Any) -> list[str]:
    rates = {"learning_rate_llm": 1e-4, "learning_rate_vit": 1e-4, "learning_rate_projector": 1e-4}
    return command(model, registry, out, "full", **({"max_steps": 3, "mixed_precision": "no"} | rates | more))


def squares_sum_up(lines: list[dict[str, Any]]) -> bool:
    return all(
        line["grad_norm"] == pytest.approx(math.sqrt(sum(n**2 for n in line["grad_norms"].values())), rel=1e-5)
        for line in lines
    )


LAYOUTS: dict[str, dict[str, Any]] = {
    "copies": {"processes": 2},
    "ZeRO-2": {"processes": 2, "deepspeed": "zero2"},
    "ZeRO-3": {"processes": 2, "deepspeed": "zero3"},
    "ZeRO-2 alone, bf16": {"processes": 1, "deepspeed": "zero2", "mixed_precision": "bf16"},
    "ZeRO-3 offload": {"processes": 2, "deepspeed": "zero3_offload"},
    "FSDP2": {"processes": 2, **FSDP_ON_CPU},
}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(
            layout,
            marks=[pytest.mark.slow, pytest.mark.skipif(not CPU_ADAM, reason="DeepSpeed's CPU Adam is not compiled")],
        )
        if layout == "ZeRO-3 offload"
        else pytest.param(layout, marks=pytest.mark.slow)
        if layout != "copies"
        else layout
        for layout in LAYOUTS
    ],
)
def test_parts_have_the_norms_of_one_process(tiny: Callable[..., Path], tmp_path: Path, layout: str) -> None:
    registry, chosen = write_data(tmp_path, 21), dict(LAYOUTS[layout])
    options = {key: chosen.pop(key) for key in ("deepspeed", "mixed_precision") if key in chosen}
    processes = chosen["processes"]
    train(words(tiny(), registry, tmp_path / "one", **(options | {"deepspeed": None})))
    line = words(tiny(), registry, tmp_path / "other", per_device_train_batch_size=4 // processes, **options)
    start(line, **chosen)
    one, other = metrics(tmp_path / "one"), metrics(tmp_path / "other")
    assert len(one) == len(other) == 3
    assert squares_sum_up(one)
    assert squares_sum_up(other)
    near = 1e-4 if "mixed_precision" not in options else 0.2
    for a, b in zip(one, other, strict=True):
        assert a["grad_norms"].keys() == b["grad_norms"].keys() == PARTS
        assert all(n > 0 for n in a["grad_norms"].values())
        assert all(b["grad_norms"][part] == pytest.approx(n, rel=near) for part, n in a["grad_norms"].items())


@pytest.mark.parametrize("limit", [0.0, 1.0, 1e6])
def test_the_whole_norm_and_the_clipping_are_torchs_to_the_bit(limit: float) -> None:
    torch.manual_seed(0)
    shapes = [(64, 33), (7,), (128, 128), (3, 5, 7), (1,), (40, 11)]
    first = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    second = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for a, b in zip(first[:-1], second[:-1], strict=True):
        a.grad = torch.randn(a.shape) * 3
        b.grad = a.grad.clone()
    groups = [{"params": first[::2], "part": "llm"}, {"params": first[1:5:2], "part": "vit"}]
    groups.append({"params": first[5:], "part": "projector"})
    engine = Engine("no", limit)
    engine.prepare(torch.nn.ParameterList(first), torch.optim.AdamW(groups))
    norm, norms = engine._clip()
    order = [*second[::2], *second[1:5:2], *second[5:]]
    assert norm == float(torch.nn.utils.clip_grad_norm_(order, limit or math.inf))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(first[:-1], second[:-1], strict=True))  # type: ignore[arg-type]
    assert norms.keys() == {"llm", "vit", "projector"}
    assert norms["projector"] == 0  # it has no gradient
    assert math.hypot(*norms.values()) == pytest.approx(norm, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_zeros_step_clips_as_deepspeed_does(tiny: Callable[..., Path], tmp_path: Path, layout: str) -> None:
    """On its way, and not in a pass of its own. Of gradients this small Adam's result hangs on their size."""
    registry = write_data(tmp_path, 21)
    options = {"deepspeed": layout, "lr_scheduler_type": "constant", "warmup_steps": 0, "learning_rate_llm": 1e-2}

    def go(name: str, **more: Any) -> Path:
        fault = more.pop("fault", {"kind": "none"})
        start(words(tiny(), registry, tmp_path / name, **options, **more), processes=2, fault=fault)
        return tmp_path / name

    own, lean = go("own", max_grad_norm=1e-6), go("lean", max_grad_norm=1e-6, fault={"kind": "fused_zero"})
    assert [line["grad_norm"] for line in metrics(lean)] == pytest.approx(
        [x["grad_norm"] for x in metrics(own)], rel=1e-4
    )
    assert distance(final_weights(own), final_weights(lean)) < 1e-5
    assert distance(final_weights(own), final_weights(go("as they are", max_grad_norm=0.0))) > 1e-3


ZERO2: dict[str, Any] = {"stage": 2, "overlap_comm": True, "contiguous_gradients": True, "reduce_scatter": True}
OF_MEANS: dict[str, Any] = {"gradient_allreduce_op": "mean"}


@pytest.mark.slow
def test_zero2_sums_gradients_as_deepspeed_does(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """To the bit, in bf16: several rows, buckets of several weights and weights that are larger."""
    registry = write_data(tmp_path, 36)

    def go(name: str, config: dict[str, Any], fault: str = "none", **more: Any) -> Path:
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"zero_optimization": ZERO2 | {"reduce_bucket_size": 4000} | more} | config))
        options = {"deepspeed": file, "mixed_precision": "bf16", "learning_rate_llm": 1e-2}
        options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
        start(words(tiny(), registry, tmp_path / name, **options), processes=2, fault={"kind": fault})
        return tmp_path / name

    own = go("DeepSpeed's", OF_MEANS, use_multi_rank_bucket_allreduce=True)
    sizes = [weight.numel() for weight in final_weights(own).values()]
    assert max(sizes) > 4000 > 2 * min(sizes)
    for other in (
        go("slices", {}, fault="no_bucket_goes_to_all"),
        go("means", OF_MEANS),
        go("no buckets", {}, contiguous_gradients=False),
    ):
        for key in ("loss", "grad_norm", "grad_norms"):
            assert [line[key] for line in metrics(other)] == [line[key] for line in metrics(own)], (other, key)
        assert distance(final_weights(own), final_weights(other)) == 0, other


REDUCES = {
    "partition_gradients": True, "contiguous_gradients": True, "reduce_scatter": True, "gradient_average": False,
    "cpu_offload": False, "zenflow": False, "has_moe_layers": False, "sequence_parallel_size": 1,
    "communication_data_type": torch.bfloat16, "bit16_groups": [[1], [2]],
}  # fmt: skip


@pytest.mark.parametrize(
    "other",
    [
        {}, {"partition_gradients": False}, {"contiguous_gradients": False}, {"reduce_scatter": False},
        {"gradient_average": True}, {"cpu_offload": True}, {"zenflow": True}, {"has_moe_layers": True},
        {"sequence_parallel_size": 2}, {"communication_data_type": torch.float32}, {"bit16_groups": None},
        {"bit16_groups": [[1], ["in bf16"]]}, {"use_multi_rank_bucket_allreduce": True},
    ],
)  # fmt: skip
def test_what_else_a_file_asks_for_is_left_to_deepspeed(other: dict[str, Any]) -> None:
    config = {key: value for key, value in other.items() if key.startswith("use")}
    zero = SimpleNamespace(**REDUCES | other, dtype=torch.bfloat16)
    zero._use_compact_grad_partition_buffer = lambda group: zero.bit16_groups[group] != ["in bf16"]
    assert can_reduce_slices(zero, config) == (not other)


@pytest.mark.parametrize(
    ("file", "op"),
    [
        ({}, "sum"), (OF_MEANS, "mean"), ({"compile": {"deepcompile": False}}, "sum"),
        ({"compile": {"deepcompile": True}}, None), ({"zero_optimization": {"stage": 2, "zenflow": {}}}, None),
        ({"zero_optimization": {"stage": 3}}, None), ({"zero_optimization": {"stage": 1}}, None),
    ],
)  # fmt: skip
def test_only_zero2_is_told_to_sum(tmp_path: Path, file: dict[str, Any], op: str | None) -> None:
    (tmp_path / "file.json").write_text(json.dumps({"zero_optimization": {"stage": 2}} | file))
    config = completed(read_config(tmp_path / "file.json"), precision="bf16", max_grad_norm=1.0)
    assert config.get("gradient_allreduce_op") == op


@pytest.mark.slow
def test_a_part_whose_gradient_is_not_finite_has_none(tiny: Callable[..., Path], tmp_path: Path) -> None:
    line = words(tiny(), write_data(tmp_path, 12), tmp_path / "out", deepspeed="zero3")
    start(line, fault={"kind": "not_finite", "rows": [1], "what": "gradient"})
    first, second, _ = metrics(tmp_path / "out")
    assert all(n > 0 for n in first["grad_norms"].values())
    assert second["grad_norm"] is None
    assert None in second["grad_norms"].values()


def test_norms_of_bf16_gradients_have_fp32s_digits() -> None:
    gradient = torch.full((1000,), 1.0, dtype=torch.bfloat16)
    assert float(norms_of([gradient])[0]) == pytest.approx(1000**0.5, rel=1e-6)


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_step_ahead_of_its_norm_is_the_same_step(limit: float) -> None:
    """The fused optimizer divides the gradients itself, and leaves all as it is where they are not finite."""
    ends = []
    for fused in (False, True):
        torch.manual_seed(0)
        ps = [torch.nn.Parameter(torch.randn(shape)) for shape in [(64, 33), (7,), (128, 128)]]
        engine = Engine("no", limit)
        optimizer = torch.optim.AdamW([{"params": ps, "part": "llm"}], lr=1e-2, fused=fused)
        engine.prepare(torch.nn.ParameterList(ps), optimizer)
        assert scales_gradients(optimizer) == fused
        found = []
        for step in range(4):
            for p in ps:
                p.grad = torch.randn_like(p) * 3
            if step == 2:
                assert ps[1].grad is not None
                ps[1].grad[0] = torch.nan
            before = [p.detach().clone() for p in ps]
            meanwhile = Mock()
            update = engine.update(meanwhile)
            meanwhile.assert_called_once_with()
            assert update.applied == (step != 2)
            assert all(torch.equal(a, b) for a, b in zip(before, ps, strict=True)) == (step == 2)
            assert all(p.grad is None for p in ps)
            found.append(update.norm)
        assert math.isnan(found.pop(2))
        ends.append((found, [p.detach() for p in ps], [float(optimizer.state[p]["step"]) for p in ps]))
    (norms, weights, steps), (norms_, weights_, steps_) = ends
    assert norms == norms_
    assert steps == steps_ == [3.0] * 3
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(weights, weights_, strict=True))
