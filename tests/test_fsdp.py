"""FSDP2: vlft's engine with two gloo processes, without Accelerate's plugin, which is for GPUs (tests/gpu)."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks_here import on_ranks
from runs import FSDP, FSDP_ON_CPU, command, distance, final_weights, metrics, start, train, write_data
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.utils import _to_kwargs

from vlft.batch import ToInputs
from vlft.data.collate import collate
from vlft.engine.fsdp import FsdpEngine, mixed_precision_policy, passing_bytes, units_of
from vlft.errors import ConfigError
from vlft.grids import Layout
from vlft.models.load import PictureFacts


def words(model: Path, registry: Path, out: Path, strategy: str, **more: Any) -> list[str]:
    options = {"max_steps": 6, "learning_rate_llm": 1e-4, "mixed_precision": "no", "save_steps": 3} | more
    return command(model, registry, out, strategy, **options)


CUT = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}


@pytest.mark.slow
@pytest.mark.parametrize("joined", [1, 2, None])
@pytest.mark.parametrize("strategy", ["full", "lora_llm_full_vit", "partial_llm_full_vit", "qlora"])
def test_two_processes_end_with_the_weights_of_one(
    tiny: Callable[..., Path], tmp_path: Path, strategy: str, joined: int | None
) -> None:
    """`joined`: layers of the language model in a unit; None: all, and all of the tower."""
    model = tiny(layers=4)
    unit = joined and joined * sum(
        value.numel() for name, value in load_file(model / "model.safetensors").items() if ".layers.0." in name
    )
    registry = write_data(tmp_path, 21)
    options = {"lora_dropout": 0.0} if "lora" in strategy else {}
    fixed = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    train(words(model, registry, tmp_path / "one", strategy, **options, **fixed))
    out = tmp_path / "two"
    line = words(model, registry, out, strategy, **CUT, **options, **fixed)
    start(line, processes=2, fault={"kind": "fsdp_on_cpu", "unit": unit}, **FSDP)
    assert distance(final_weights(tmp_path / "one"), final_weights(out)) < 1e-5
    for a, b in zip(metrics(tmp_path / "one"), metrics(out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    (file,) = (out / "model").glob("*model.safetensors")
    one, two = load_file(tmp_path / "one/model" / file.name), load_file(file)
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[n].float(), two[n].float(), atol=1e-4) for n in one)


@pytest.mark.slow
def test_shards_that_lie_twice(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry, model = write_data(tmp_path, 21), tiny(layers=4)
    fixed = {"lr_scheduler_type": "constant", "warmup_steps": 0, "per_device_train_batch_size": 4}
    train(words(model, registry, tmp_path / "one", "full", **fixed))
    out, cut = tmp_path / "cut", fixed | {"per_device_train_batch_size": 1}
    for more in ({"max_steps": 3}, {"resume_from_checkpoint": "latest"}):
        line = words(model, registry, out, "full", **(cut | more))
        start(line, processes=4, fault={"kind": "fsdp_on_cpu", "copies": 2}, **FSDP)
    assert distance(final_weights(tmp_path / "one"), final_weights(out)) < 1e-5
    for a, b in zip(metrics(tmp_path / "one"), metrics(out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("strategy", ["full", pytest.param("qlora", marks=pytest.mark.slow)])
def test_in_bf16_it_computes_what_whole_copies_do(tiny: Callable[..., Path], tmp_path: Path, strategy: str) -> None:
    """To the last digit: FSDP casts inputs of layers if it may, and the tower's angles lose theirs."""
    registry = write_data(tmp_path, 21)
    options = {"max_steps": 1, "mixed_precision": "bf16"} | ({"lora_dropout": 0.0} if strategy == "qlora" else {})
    for name, how in (("copies", {}), ("cut", FSDP_ON_CPU)):
        line = words(tiny(dtype="bfloat16"), registry, tmp_path / name, strategy, **CUT, **options)
        start(line, processes=2, **how)
    copies, cut = metrics(tmp_path / "copies"), metrics(tmp_path / "cut")
    assert [line["loss"] for line in copies] == [line["loss"] for line in cut]


def test_what_python_reads_of_a_row_is_brought_to_no_device() -> None:
    """FSDP brings tensors there, and the host would wait for all that the device was asked for before."""
    facts = PictureFacts(Layout(2, 14, 112, 0), 2, (0.5,) * 3, (0.5,) * 3, 1 / 255, 3136, 1 << 20)
    row = collate([], [], image_token_id=1, pad_token_id=0)
    inputs = ToInputs(facts, None, torch.device("cpu"))(row, training=False)
    moved = _to_kwargs((), inputs, torch.device("meta"), False)[1][0]
    assert moved["image_grid_thw"] is inputs["image_grid_thw"]
    assert moved["input_ids_T"].is_meta


def cut_up(model: nn.Module, optimizer: torch.optim.Optimizer, *, ranks: int = 1, precision: str = "no") -> Any:
    """As the engine does, which itself is for GPUs: what stands in its place has what the cutting asks of it."""
    how = {"reshard_after_forward": True, "mp_policy": mixed_precision_policy(precision)}
    engine: Any = SimpleNamespace(device=torch.device("cpu"), world_size=ranks, _sharding=lambda: how)
    FsdpEngine._shard(engine, model, optimizer)
    return engine


def _missing_gradients(rank: int, out: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    groups = [{"params": [layer.weight], "names": [f"{i}.weight"], "part": "llm"} for i, layer in enumerate(model)]
    optimizer = torch.optim.SGD(groups)
    engine = cut_up(model, optimizer, ranks=2)
    FsdpEngine._note_parameters(engine, optimizer)
    # Who asks one from now on fails. (mypy: a method is not to be replaced.)
    DTensor.to_local = None  # type: ignore[method-assign,assignment]
    found = [FsdpEngine._pending_gradients(engine)]
    second = optimizer.param_groups[1]["params"][0]
    second.grad = torch.zeros_like(second)
    found.append(FsdpEngine._pending_gradients(engine))
    if rank == 0:
        out.write_text(json.dumps(found))


def test_bytes_of_gradients_that_are_missing(tmp_path: Path) -> None:
    """Asked before every row, of hundreds of DTensors, of which each would take the host microseconds."""
    on_ranks(_missing_gradients, 2, tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text()) == [4 * (16 + 8) // 2, 4 * 16 // 2]


class Tower(nn.Module):
    _no_split_modules = ("Linear",)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))


def _gathered_ahead(_: int, out: Path) -> None:
    model = Tower()
    optimizer = torch.optim.SGD([{"params": [*model.parameters()], "names": [n for n, _ in model.named_parameters()]}])
    cut_up(model, optimizer)
    root, first = (fully_shard.state(module) for module in (model, model.layers[0]))
    out.write_text(json.dumps([state is first for state in root._states_to_forward_prefetch]))


def test_the_first_layers_are_gathered_with_the_root(tmp_path: Path) -> None:
    """And not when the host comes to them, which at a step's start has nothing ahead of the GPU."""
    on_ranks(_gathered_ahead, 1, tmp_path / "ahead.json")
    assert json.loads((tmp_path / "ahead.json").read_text()) == [True]


def _shards_of(_: int, out: Path) -> None:
    model = nn.Sequential(OrderedDict(packed=nn.Linear(4, 4, bias=False), plain=nn.Linear(4, 4, bias=False)))
    model[0].weight.requires_grad_(False).quant_state = "as bitsandbytes'"  # type: ignore[attr-defined]
    plain = model[1].weight
    optimizer = torch.optim.SGD([{"params": [plain], "names": ["plain.weight"]}])
    cut_up(model, optimizer, precision="bf16")
    cut = {name: isinstance(p, DTensor) for name, p in model.named_parameters()}
    out.write_text(json.dumps(cut | {"left of what was cut": plain.numel()}))


def test_packed_weights_stay_whole(tmp_path: Path) -> None:
    """Cut up, some of those that are stored as bf16 changed on a GPU, whose copies take them for numbers."""
    on_ranks(_shards_of, 1, tmp_path / "cut.json")
    found = json.loads((tmp_path / "cut.json").read_text())
    # Nor does a whole weight lie beside its shard, because the optimizer had it.
    assert found == {"packed.weight": False, "plain.weight": True, "left of what was cut": 0}


@pytest.mark.slow
def test_masters_are_saved_after_an_evaluation(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Which leaves what it gathered."""
    registry = write_data(tmp_path, 12)
    write_data(tmp_path, 4, name="held", split="eval")
    out, more = tmp_path / "out", {"mixed_precision": "bf16", "metric_for_best": "held/loss", "eval_steps": 1}
    line = words(tiny(), registry, out, "full", **CUT, **(more | {"max_steps": 2, "save_steps": 2}))
    start(line, processes=2, **FSDP_ON_CPU)
    saved = [load_file(file) for file in sorted((out / "checkpoints/step-000001").glob("weights*.safetensors"))]
    assert saved
    assert {value.dtype for file in saved for value in file.values()} == {torch.float32}


def test_layers_are_joined_alike() -> None:
    """To a quarter of a billion parameters; what is larger is alone, and packed weights do not count."""

    def sizes(layers: int, width: int, **more: Any) -> list[int]:
        with torch.device("meta"):
            run = [nn.Linear(width, width, bias=False) for _ in range(layers)]
        ignored = {layer.weight for layer in run} if more.get("packed") else set[nn.Parameter]()
        return [len(unit) for unit in units_of(run, ignored)]

    assert sizes(36, 8800) == [3] * 12
    assert sizes(32, 4500) == [11, 11, 10]
    assert sizes(28, 15200) == [1] * 28
    assert sizes(4, 40000) == [1] * 4
    assert sizes(36, 8800, packed=True) == [36]


@pytest.mark.parametrize(
    ("reshard", "kind", "alone", "expected"),
    [
        (True, torch.bfloat16, False, 2 * (3 * 8 + 5 * 4)),
        (True, torch.bfloat16, True, 2 * (3 * 8 + 2 * 4)),
        (False, torch.bfloat16, False, 2 * (12 + 2 * 8 + 5 * 4)),
        (True, None, False, 4 * (3 * 8 + 5 * 4)),
    ],
)
def test_what_a_row_holds_in_passing(reshard: bool, kind: torch.dtype | None, alone: bool, expected: int) -> None:
    """Four numbers that train in either unit, four that do not in the second; packed ones are not gathered."""
    one, frozen, other, packed = (nn.Linear(2, 2, bias=False) for _ in range(4))
    for layer in (frozen, packed):
        layer.weight.requires_grad_(False)
    units = [[one, packed], [frozen, other]]
    assert passing_bytes(units, {packed.weight}, reshard=reshard, kind=kind, alone=alone) == expected


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_a_resume_under_it(tiny: Callable[..., Path], tmp_path: Path, fused: bool) -> None:
    """`fused`: the optimizer steps before its norm is read, as on a GPU."""
    registry, out = write_data(tmp_path, 21), tmp_path / "two"
    fixed = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    train(words(tiny(), registry, tmp_path / "one", "full", **fixed))
    for more in ({"max_steps": 3}, {"resume_from_checkpoint": "latest"}):
        line = words(tiny(), registry, out, "full", **(CUT | fixed | more))
        start(line, processes=2, fault={"kind": "fsdp_on_cpu", "fused": fused}, **FSDP)
    assert distance(final_weights(tmp_path / "one"), final_weights(out)) < 1e-5
    for a, b in zip(metrics(tmp_path / "one"), metrics(out), strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_cpu_is_refused_with_the_reason(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="FSDP2 needs a GPU"):
        train(words(tiny(), write_data(tmp_path), tmp_path / "out", "full"))
