"""The plan that a run says before its first step: the numbers of `vlft plan`, from what the run has at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from runs import command, train, write_data

from vlft.commands import read_plan
from vlft.data import prepare
from vlft.engine import Engine
from vlft.models.peaks import peak_flops
from vlft.planning import gpus, start
from vlft.planning.estimate import Cut, Estimate, estimate, shared_out
from vlft.planning.memory import NF4, Copies, PartSize, Static
from vlft.setup import beside_head

H100 = gpus.by_name("H100")


def said(monkeypatch: pytest.MonkeyPatch, words: list[str], name: str = "h100") -> list[str]:
    """The lines of a run that believes in a GPU."""
    real = start.say_plan
    lines: list[str] = []

    def watched(job: Any) -> None:
        job.meter.peak = peak_flops(name, "bfloat16")
        job.journal.say = lines.append
        real(job)
        del job.journal.say
        raise KeyboardInterrupt

    monkeypatch.setattr("vlft.train.say_plan", watched)
    monkeypatch.setattr(gpus, "here", lambda: H100)
    with pytest.raises(KeyboardInterrupt):
        train(words)
    return lines


def planned(words: list[str]) -> Estimate:
    return estimate(read_plan(words).run, H100)


@pytest.mark.parametrize("strategy", ["full", "lora_llm_full_vit", "qlora"])
def test_it_is_what_the_command_says(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    words = command(
        tiny(), write_data(tmp_path, 40), tmp_path / "out", strategy, mixed_precision="bf16", max_steps=None, epochs=1,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    expected = planned(words)
    lines = said(monkeypatch, words)
    assert lines == [start._memory(expected.memory, H100), start._time(expected.time, expected.steps)]
    assert lines[0].startswith("plan: ")
    assert "of 78.8 GiB at the worst moment (weights " in lines[0]
    assert "an epoch of 10 steps." in lines[1]


def test_a_size_that_a_process_may_have_is_what_there_is(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlft.setup.check_memory", lambda *_: None)  # this one has no GPU
    words = command(
        tiny(), write_data(tmp_path, 40), tmp_path / "out", "full", mixed_precision="bf16", max_steps=4,
        per_device_train_batch_size=8, memory="0.9GiB",
    )  # fmt: skip
    expected = planned(words)
    lines = said(monkeypatch, words)
    assert lines[0] == start._memory(expected.memory, expected.gpu)
    assert "of 0.9 GiB at the worst moment" in lines[0]


def test_a_cpu_is_told_nothing_of_memory_and_time(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(command(tiny(), write_data(tmp_path), tmp_path / "out", "full", max_steps=1))
    out = capsys.readouterr().out
    assert "plan:" not in out
    assert "data: a sample has 35 to 93 tokens (half of them up to " in out


def test_sizes_that_are_all_one_are_no_range() -> None:
    assert prepare._spread(np.array([35, 40, 93]), "token") == "35 to 93 tokens (half of them up to 40)"
    assert prepare._spread(np.array([64, 64]), "patch") == "64 patches"


def test_what_others_hold_is_told(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "held_by_others", lambda: "other processes hold 20.0 of its 79.6 GiB")
    last = said(monkeypatch, command(tiny(), write_data(tmp_path), tmp_path / "out", "full"))[-1]
    assert last.startswith("this GPU is shared: other processes hold 20.0 of its 79.6 GiB; ")


def test_a_gpu_that_no_table_knows_is_told_no_time(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = said(monkeypatch, command(tiny(), write_data(tmp_path), tmp_path / "out", "full"), "Voodoo 2")
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("cut", "weights", "gradients", "states"),
    [
        (Cut(), 400, 400, 800),
        (Cut(2, masters=True), 200, 100, 600),
        (Cut(2, masters=True, wide_sums=True), 200, 200, 600),
        (Cut(3, masters=True), 100, 100, 600),
        (Cut(3), 200, 200, 400),
        (Cut(2, masters=True, states_away=True), 200, 0, 0),
        (Cut(3, masters=True, states_away=True, weights_away=True), 0, 0, 0),
    ],
)
def test_what_engines_cut_up(cut: Cut, weights: float, gradients: float, states: float) -> None:
    """A hundred weights in fp32 on two processes."""
    none = Copies()
    whole = Static([PartSize("llm", 100, 100, 400.0)], 400.0, 800.0, (0.0, 0.0), False, ([], []), ([], []), none, none)
    found = shared_out(whole, cut, 2, compute=2)
    assert (found.weights, found.gradients, found.states) == (weights, gradients, states)


def test_fsdp_leaves_packed_weights_whole() -> None:
    none, packed = Copies(), PartSize("llm", 100, 0, 80 * NF4 + 40.0, quantised=80)
    whole = Static([packed], 0.0, 0.0, (0.0, 0.0), False, ([], []), ([], []), none, none)
    assert shared_out(whole, Cut(3), 2, compute=2).weights == (80 * NF4 + 40) / 2
    assert shared_out(whole, Cut(3, packed_whole=True), 2, compute=2).weights == 80 * NF4 + 20


@pytest.mark.parametrize(
    ("weight", "precision", "trains", "shards", "later", "expected"),
    [
        (torch.bfloat16, "bf16", False, "", False, 0),
        (torch.bfloat16, "bf16", True, "", False, 0),
        (torch.bfloat16, "bf16", True, "", True, 2),  # beside the gradient that it is added to
        (torch.float32, "bf16", True, "", False, 4),  # a cast, and a gradient before it is widened
        (torch.float32, "bf16", True, "", True, 6),  # a gradient before and after it is widened
        (torch.float32, "no", True, "", False, 0),
        (torch.bfloat16, "bf16", True, "states", False, 2),
        (torch.bfloat16, "bf16", True, "weights", False, 4),
        (torch.bfloat16, "bf16", False, "weights", False, 2),
    ],
)
def test_what_the_head_takes_beside_its_weight(
    weight: torch.dtype, precision: str, trains: bool, shards: str, later: bool, expected: int
) -> None:
    head = torch.nn.Parameter(torch.zeros(7, 3, dtype=weight), requires_grad=trains)
    head.grad = torch.zeros_like(head) if later else None
    engine = Mock(precision=precision, shards_weights=shards == "weights", shards_states=shards != "")
    assert beside_head(head, engine) == 21 * expected


def test_a_file_of_the_launcher_is_planned_with(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed then runs without --deepspeed."""
    words = command(tiny(), write_data(tmp_path, 8), tmp_path / "out", "full", mixed_precision="bf16", max_steps=1)
    real = start.shared_out
    cuts: list[Cut] = []
    monkeypatch.setattr(
        start, "shared_out", lambda static, cut, *a, **k: cuts.append(cut) or real(static, cut, *a, **k)
    )
    monkeypatch.setattr(
        Engine, "deepspeed", {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    )
    said(monkeypatch, words)
    assert cuts == [Cut(2, masters=True, states_away=True, wide_sums=True)]
