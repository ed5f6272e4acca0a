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

from vlft.engine.zero_layers import ELSEWHERE, HOOKS, REPLACED, can_gather_layers

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
    """Three ranks: no weight of a tiny model is a multiple of them. DeepSpeed divides by three, and we do not."""
    how = {"model": tiny(), "strategy": "full", "mixed_precision": "no", "processes": 3}
    own = go(tmp_path / "own", fault="layers_by_weights", **how)
    other = go(tmp_path / "layers", fault="no_layer_by_weights", **how)
    assert [line["grad_norm"] for line in metrics(other)] == pytest.approx(
        [line["grad_norm"] for line in metrics(own)], rel=1e-5
    )
    assert distance(final_weights(own), final_weights(other)) < 1e-5


GATHERS = {
    "offload_optimizer": False, "offload_param": False, "zenflow": False, "zero_hpz_partition_size": 1,
    "sequence_parallel_size": 1, "communication_data_type": torch.bfloat16, "gradient_predivide_factor": 1.0,
    "parameter_offload": SimpleNamespace(**dict.fromkeys(HOOKS, print)), **dict.fromkeys(REPLACED, print),
}  # fmt: skip


@pytest.mark.parametrize(
    "other",
    [
        {}, {"offload_optimizer": True}, {"offload_param": True}, {"zenflow": True}, {"zero_hpz_partition_size": 2},
        {"sequence_parallel_size": 2}, {"communication_data_type": torch.float32}, {"gradient_predivide_factor": 2.0},
        *({key: True} for key in ELSEWHERE),
    ],
)  # fmt: skip
def test_what_else_a_file_asks_for_is_left_to_deepspeed(other: dict[str, Any]) -> None:
    zero = SimpleNamespace(**GATHERS | other, dtype=torch.bfloat16)
    config = {key: value for key, value in other.items() if key in ELSEWHERE}
    assert can_gather_layers(zero, config) == (not other)


@pytest.mark.parametrize("name", REPLACED)
def test_a_deepspeed_that_sums_in_another_way_is_left_to_itself(name: str) -> None:
    there = {key: value for key, value in GATHERS.items() if key != name}
    assert not can_gather_layers(SimpleNamespace(**there, dtype=torch.bfloat16), {})


def test_zero2_has_no_layers_to_gather() -> None:
    assert not can_gather_layers(SimpleNamespace(bit16_groups=[[1]]), {})
