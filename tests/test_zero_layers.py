"""ZeRO-3's layers, gathered and summed as wholes: what comes of it is what DeepSpeed makes of them weight by weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import command, distance, final_weights, metrics, start, write_data

from vlft.engine.zero_layers import ELSEWHERE, HOOKS, NEEDED, can_gather_layers

ZERO3: dict[str, Any] = {
    "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "stage3_param_persistence_threshold": 100,
    "stage3_prefetch_bucket_size": 4000, "reduce_bucket_size": 4000,
}  # fmt: skip


def go(out: Path, model: Path, strategy: str, fault: str, **more: Any) -> Path:
    file = out.with_suffix(".json")
    file.write_text(json.dumps({"zero_optimization": ZERO3}))
    options = {"deepspeed": file, "max_steps": 4, "eval_steps": 2, "train_split_ratio": 0.8}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    options |= {} if strategy in ("full", "vit_only") else {"lora_dropout": 0.0}
    processes = more.pop("processes", 2)
    line = command(model, write_data(out.parent, 36), out, strategy, **options | more)
    start(line, processes=processes, fault={"kind": fault})
    return out


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["full", "lora_llm_full_vit", "vit_only", "qlora"])
def test_layers_train_as_deepspeed_trains_them(tiny: Callable[..., Path], tmp_path: Path, strategy: str) -> None:
    """To the bit, in bf16, over rows with and without pictures and evaluations between them."""
    how = {"model": tiny(dtype="bfloat16"), "strategy": strategy, "mixed_precision": "bf16"}
    own = go(tmp_path / "own", fault="layers_by_weights", **how)
    other = go(tmp_path / "layers", fault="no_layer_by_weights", **how)
    for key in ("loss", "grad_norm", "grad_norms"):
        assert [line[key] for line in metrics(other)] == [line[key] for line in metrics(own)], key
    assert distance(final_weights(own), final_weights(other)) == 0


@pytest.mark.slow
def test_shards_that_are_filled_up_hold_the_same_weights(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Three ranks: no weight of a tiny model is a multiple of them. DeepSpeed divides by three, which is not exact."""
    how = {"model": tiny(), "strategy": "full", "mixed_precision": "no", "processes": 3}
    own = go(tmp_path / "own", fault="layers_by_weights", **how)
    other = go(tmp_path / "layers", fault="no_layer_by_weights", **how)
    assert [line["grad_norm"] for line in metrics(other)] == pytest.approx(
        [line["grad_norm"] for line in metrics(own)], rel=1e-5
    )
    assert distance(final_weights(own), final_weights(other)) < 1e-5


def zero3(**other: Any) -> SimpleNamespace:
    """What is asked of DeepSpeed's optimizer, of a model of two layers and a head."""
    model = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
    hooks: dict[str, Any] = dict.fromkeys(HOOKS, print) | {"module": model}
    there: dict[str, Any] = {
        "offload_optimizer": False, "offload_param": False, "zenflow": False, "zero_hpz_partition_size": 1,
        "sequence_parallel_size": 1, "ipg_buckets": {torch.bfloat16: "a bucket"}, "gradient_predivide_factor": 1.0,
        "reduce_scatter": True, "dtype": torch.bfloat16, "dp_process_group": "all",
        "_get_param_partition_group": lambda _: "all", "_global_ranks": len,
        "parameter_offload": SimpleNamespace(**hooks),
    }  # fmt: skip
    return SimpleNamespace(**dict.fromkeys(NEEDED, print) | there | other)


def layers_of(zero: SimpleNamespace) -> list[torch.nn.Module]:
    return list(zero.parameter_offload.module[:2])


@pytest.mark.parametrize(
    "other",
    [
        {}, {"offload_optimizer": True}, {"offload_param": True}, {"zenflow": True}, {"zero_hpz_partition_size": 2},
        {"sequence_parallel_size": 2}, {"reduce_scatter": False}, {"gradient_predivide_factor": 2.0},
        {"ipg_buckets": {torch.float32: "of another dtype"}}, {"_get_param_partition_group": lambda _: "some"},
        {"_get_param_partition_group": lambda p: "all" if p.dim() == 1 else "two"},
        *({key: True} for key in ELSEWHERE),
    ],
)  # fmt: skip
def test_what_else_a_file_asks_for_is_left_to_deepspeed(other: dict[str, Any]) -> None:
    zero = zero3(**other)
    config = {key: value for key, value in other.items() if key in ELSEWHERE}
    assert can_gather_layers(zero, config, layers_of(zero)) == (not other)
    assert not can_gather_layers(zero, config, [])


@pytest.mark.parametrize("beside", [1, 2])
def test_a_weight_that_is_not_of_one_layer_alone_is_left_to_deepspeed(beside: int) -> None:
    zero = zero3()
    modules = zero.parameter_offload.module
    modules[beside].weight = modules[0].weight
    assert not can_gather_layers(zero, {}, layers_of(zero))


@pytest.mark.parametrize("name", [*NEEDED, *HOOKS])
def test_a_deepspeed_that_works_in_another_way_is_left_to_itself(name: str) -> None:
    zero = zero3()
    delattr(zero if name in NEEDED else zero.parameter_offload, name)
    assert not can_gather_layers(zero, {}, layers_of(zero))


def test_zero2_has_no_layers_to_gather() -> None:
    assert not can_gather_layers(SimpleNamespace(bit16_groups=[[1]]), {}, [torch.nn.Linear(4, 4)])
