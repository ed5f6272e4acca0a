"""`vlft plan`: what it counts against what is, and its advice."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from runs import write_data
from torch import nn

from vlft.allocator import CONTEXT
from vlft.commands import COMMANDS, parse_command, read_plan
from vlft.data.tokens import Chat
from vlft.errors import ConfigError
from vlft.models.flops import Shape
from vlft.models.forward import PackedVLM
from vlft.models.kernels.memory import MARGIN, Cost, Memory, Sizes
from vlft.models.load import load_config, open_checkpoint, source_of
from vlft.planning import advice, gpus
from vlft.planning.estimate import Estimate, _chat, estimate
from vlft.planning.gpus import GIB
from vlft.planning.load import histogram
from vlft.planning.memory import NF4, PIECES, memory_of, static_of, towers_of
from vlft.planning.skeleton import SkeletonSource, prepared
from vlft.planning.time import ADAPTED, ANEW, FORWARD, LAYER, PACKED, STEP
from vlft.proof import logical_size
from vlft.strategy import ParamGroup, Strategy

STRATEGIES = ("full", "partial_llm_full_vit", "vit_only", "lora", "lora_llm_full_vit", "qlora")
BIG = {
    "text_config": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "layer_types": ["full_attention"] * 28,
    },
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16, "out_hidden_size": 3584,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    },
}  # fmt: skip
"""Qwen2.5-VL-7B."""


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the size of 7B without weights, and a registry beside it."""
    from vlft.testing import make_checkpoint

    root = tmp_path_factory.mktemp("seven")
    folder = make_checkpoint("qwen2_5_vl", root / "model")
    config = json.loads((folder / "config.json").read_text())
    for part, sizes in BIG.items():
        config[part] |= sizes
    config["text_config"]["rope_parameters"]["mrope_section"] = [16, 24, 24]
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    write_data(root, 24)
    return root


def words(root: Path, strategy: str, *more: str) -> list[str]:
    return [
        "--model_name_or_path", str(root / "model"), "--tuning_strategy", strategy, "--dataset_config_path",
        str(root / "registry.json"), "--cache_dir", str(root / "cache"), *more,
    ]  # fmt: skip


def plan(root: Path, strategy: str, *more: str, gpu: str = "H100") -> Estimate:
    return estimate(read_plan(words(root, strategy, *more)).run, gpus.by_name(gpu))


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_model_without_weights_has_the_parameters_of_a_real_one(
    tiny: Callable[..., Path], tmp_path: Path, strategy: str, tie: bool
) -> None:
    registry, model = write_data(tmp_path, 8), tiny(tie=tie)
    line = ["--model_name_or_path", str(model), "--tuning_strategy", strategy, "--dataset_config_path", str(registry)]
    run = read_plan(line).run
    source = source_of(open_checkpoint(str(model)), "bf16", torch.device("cpu"))
    real = run.strategy(run.options).prepare_model(source)  # type: ignore[call-arg]
    bare, _ = prepared(
        run.strategy(run.options),  # type: ignore[call-arg]
        SkeletonSource(source.checkpoint, source.config, source.compute_dtype, torch.device("meta")),
    )
    assert all(p.is_meta for p in bare.parameters())
    trains = {n: (tuple(p.shape), p.requires_grad) for n, p in real.named_parameters() if p.requires_grad}
    assert {n: (tuple(p.shape), p.requires_grad) for n, p in bare.named_parameters() if p.requires_grad} == trains
    shape = Shape.of(source.config)
    found = static_of(bare, source.parts, source.tied_head, "adamw", 2, shape)
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert sum(part.trainable for part in found.parts) == trained
    assert found.gradients == 4 * trained
    assert found.states == 8 * trained
    every = sum(map(logical_size, real.parameters()))
    assert sum(part.parameters for part in found.parts) == every  # a tied head is counted once


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_layers_are_those_that_run(tiny: Callable[..., Path], family: str) -> None:
    """The sizes that the plan reads from a config, against the layers of the model."""
    source = source_of(open_checkpoint(str(tiny(family))), "no", torch.device("cpu"))
    packed = PackedVLM(source.load(), source.parts, source.config.image_token_id)
    for layer in packed.installed.language[:2]:
        layer.requires_grad_(False)
    shape = Shape.of(source.config)
    static = static_of(packed.model, source.parts, source.tied_head, "adamw", 4, shape)
    from vlft.models.flops import Work
    from vlft.planning.load import Row

    row = Row(tokens=100, patches=64, sample=50, picture=64, supervised=10, work=Work(merged=16))
    towers = towers_of(static, shape, row, 4, gradients=True)
    for tower, layers, n, longest in zip(towers, packed.installed.learning(), (64, 100), (64, 50), strict=True):
        layer: Any = layers[0]
        expected = Cost.of(Sizes.of(layer.vlft_block), n, longest, 4)
        assert (tower.layers, tower.cost) == (len(layers), expected)
        assert tower.gradients == tuple(
            4 * sum(p.numel() for p in one.parameters() if p.requires_grad) for one in layers
        )
    assert [size > 0 for size in towers[1].gradients] == [False, False, True]
    memory = Memory(packed.installed.learning(), shape.vocabulary, room=lambda: 1e12)
    for there in (False, True):  # training sees the same, in a step's first row and behind it
        memory.before_row(row.patches, row.picture, row.tokens, row.sample, row.supervised, torch.float32)
        assert memory._row[0] == towers_of(static, shape, row, 4, gradients=not there)
        for p in packed.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
    packed.zero_grad()
    packed.memory = memory
    packed.narrow_gradients(torch.bfloat16)
    memory.before_row(row.patches, row.picture, row.tokens, row.sample, row.supervised, torch.float32)
    narrowed = static.narrowed()
    assert memory._row[0] == towers_of(narrowed, shape, row, 4, gradients=True)
    gone = sum(2 * p.numel() for p in packed.parameters() if p.requires_grad and p.grad_dtype == torch.bfloat16)
    assert static.gradients - narrowed.gradients == gone > 0.1 * static.gradients


def test_logits_take_their_own_two_bytes_or_what_pytorchs_loss_does(seven: Path) -> None:
    ours, pytorchs = (plan(seven, "lora", *more).memory.logits for more in ([], ["--reference", "true"]))
    assert pytorchs == 7 * ours > 0


def test_sums_of_a_seven_billion(seven: Path) -> None:
    """Against the published count: 8.29 billion parameters."""
    found = plan(seven, "full")
    numbers = sum(part.parameters for part in found.static.parts)
    assert numbers == 8_292_166_656
    assert found.memory.weights == 4 * numbers
    assert found.memory.states == 8 * numbers
    # In one row, bf16 for all but embedding, head, norms, biases and what lies between the towers.
    assert 2.2 * numbers < found.memory.gradients < 2.4 * numbers
    assert plan(seven, "full", "--gradient_accumulation_steps", "2").memory.gradients == 4 * numbers
    assert not found.fits
    eight = plan(seven, "full", "--optim", "adamw_8bit")
    assert eight.fits
    assert eight.memory.peak < 60 * GIB


def test_four_bits(seven: Path) -> None:
    found = plan(seven, "qlora", gpu="RTX 4090")
    llm = next(part for part in found.static.parts if part.part == "llm")
    layers = 28 * (3584 * (3584 * 2 + 512 * 2) + 3 * 3584 * 18944)
    assert llm.bytes == pytest.approx(
        layers * NF4 + 2 * (llm.parameters - llm.trainable - layers) + 4 * llm.trainable, rel=1e-3
    )
    assert found.fits
    assert found.memory.peak < 12 * GIB


def test_a_longer_row_takes_more_and_what_is_computed_again_takes_less(seven: Path) -> None:
    one = plan(seven, "lora_llm_full_vit", "--per_device_train_batch_size", "1")
    eight = plan(seven, "lora_llm_full_vit", "--per_device_train_batch_size", "8")
    low = plan(seven, "lora_llm_full_vit", "--per_device_train_batch_size", "8", "--memory", "low")
    assert one.memory.peak < eight.memory.peak
    assert low.memory.peak <= eight.memory.peak  # the step itself may be the worst moment
    assert low.memory.kept < eight.memory.kept / 4
    assert low.time.again > eight.time.again == 0
    assert low.time.device > eight.time.device
    assert eight.time.step < 8 * one.time.step


def test_numbers_of_a_file_are_what_is_planned(seven: Path, tmp_path: Path) -> None:
    path = tmp_path / "memory.yaml"
    path.write_text("vision: {attention: 2, attended: 1, input: 1}\nlanguage: {input: 28}\n")
    found = plan(seven, "lora_llm_full_vit", "--memory", str(path)).memory.keeps
    assert found == (["input", "attended", "attention", "attention"] + ["all"] * 28, ["input"] * 28)


def test_a_size_is_what_is_planned_for(seven: Path) -> None:
    """As `auto` on a GPU of that size, which the table and the last line name."""
    more = ["lora_llm_full_vit", "--per_device_train_batch_size", "8"]
    whole, small = (plan(seven, *more, "--memory", text) for text in ("auto", "30.6GB"))
    assert small.memory.kept < whole.memory.kept
    assert small.time.again > whole.time.again == 0
    assert not small.fits  # the step itself is the worst moment
    assert plan(seven, *more, "--memory", "34GB").fits
    assert (small.gpu.memory, small.gpu.name) == (30_600_000_000, f"{whole.gpu.name}, --memory 30.6GB")
    assert not plan(seven, *more, "--memory", "10GB").fits
    assert plan(seven, *more, "--memory", "400GiB").gpu == whole.gpu
    assert plan(seven, *more, "--memory", "all").memory.keeps == (["all"] * 32, ["all"] * 28)


@pytest.mark.parametrize("strategy", ["lora_llm_full_vit", "partial_llm_full_vit"])
def test_what_auto_leaves_alone_is_left_in_the_plan_too(seven: Path, strategy: str) -> None:
    """`room_on_gpu` keeps a margin for what lies in pieces; a plan that fills the card says more than is ever kept."""
    found = plan(seven, strategy, "--optim", "adamw_8bit")
    shape = Shape.of(load_config(open_checkpoint(str(seven / "model"), weights=False)))
    row = replace(found.steps.largest, tokens=16_000, patches=60_000)
    for room in (55e9, 60e9, 70e9):
        memory = memory_of(found.static, shape, row, rows=1, compute=2, room=room)
        assert memory.again > 0
        assert 0.95 * (1 - MARGIN) * room < (memory.peak - CONTEXT) / PIECES + CONTEXT <= 1.01 * (1 - MARGIN) * room


def test_what_an_engine_gathers_and_sends_leaves_layers_less(seven: Path) -> None:
    found = plan(seven, "lora_llm_full_vit")
    shape = Shape.of(load_config(open_checkpoint(str(seven / "model"), weights=False)))
    row = replace(found.steps.largest, tokens=16_000, patches=60_000)
    without, passing = (
        memory_of(replace(found.static, passing=size), shape, row, rows=1, compute=2, room=60e9) for size in (0.0, 4e9)
    )
    assert passing.buffers - without.buffers == 4e9
    assert passing.kept < without.kept
    assert passing.peak == pytest.approx(without.peak, rel=0.02)


@pytest.mark.parametrize(("dropout", "times"), [("0.05", 7), ("0", 4)])
def test_what_adapters_move(seven: Path, dropout: str, times: int) -> None:
    """They are narrow: their arithmetic is a hundredth of a step's, and what they read and write an eighth of it."""
    found = plan(seven, "lora", "--lora_dropout", dropout)
    inputs, outputs = 3 * 3584 + 18944, 3584 + 2 * 512 + 3584 + 2 * 18944 + 3584
    assert found.static.adapted == (0.0, 28 * (times * inputs + 4 * outputs))
    assert 0.03 < found.time.adapters / found.time.products < 0.4
    full = plan(seven, "full")
    assert full.static.adapted == (0.0, 0.0)
    assert full.time.adapters == 0.0


def test_a_row_costs_the_host_its_layers(seven: Path) -> None:
    """All 60 layers, of which a frozen tower's 32 run forward alone; adapters and weights of 4 bits in the other 28."""
    full = plan(seven, "full", "--memory", "all").time
    assert full.host == pytest.approx(STEP + 60 * LAYER)
    assert max(full.host, full.device) < full.step < full.host + full.device
    lora = plan(seven, "lora").time.host - STEP
    assert lora == pytest.approx(32 * FORWARD + 28 * (LAYER + ADAPTED))
    assert plan(seven, "qlora").time.host - STEP == pytest.approx(lora + 28 * PACKED)
    assert plan(seven, "lora", "--memory", "low").time.host - STEP == pytest.approx(lora + 28 * (FORWARD + ANEW))
    eight = plan(seven, "lora", "--gradient_accumulation_steps", "8").time.host - STEP
    assert eight == pytest.approx(8 * lora, rel=0.2)  # an epoch's last step may have fewer rows


def test_what_layers_hold_is_counted(seven: Path) -> None:
    """Beside 7B's frozen weights: queries, keys and values joined, the tower's MLP at an aligned width, adapters."""
    found, low = plan(seven, "lora"), plan(seven, "lora", "--memory", "low")
    joined = 28 * 4608 * 3584 + 32 * 1280 * 3456 * 3
    ranks = 64 * (3 * (3584 + 4608) + (3584 + 3584) + 2 * (3584 + 2 * 18944) + (18944 + 3584))
    assert found.static.copies.held == 2 * (joined + 28 * ranks)
    assert found.memory.holds
    assert not low.memory.holds
    assert (found.memory.copies, low.memory.copies) == (found.static.copies.held, 0.0)
    assert low.memory.peak < found.memory.peak - PIECES * 0.99 * found.static.copies.held
    packed = plan(seven, "qlora").static.copies
    assert packed.fresh == 2 * 3584 * 2 * 18944  # gates and values, dequantised for one product
    assert (packed.packed, packed.adapted, packed.ranks) == (28, 28, (0, 64 * 7))


def test_the_worst_moment(seven: Path) -> None:
    """Rows of a few tokens: a step of one row ends with all gradients; behind the first row they are there before."""
    one, two = (plan(seven, "full", "--gradient_accumulation_steps", n) for n in ("1", "2"))
    static = one.static
    still = static.weights + static.states + static.gradients + static.copies.held
    assert still < (one.memory.peak - CONTEXT) / PIECES < still + 0.2 * GIB
    embedding = 4 * 152064 * 3584
    assert static.ends == (embedding, embedding)
    # A row's own gradient of the head, in both dtypes, beside the one that is there, and the head in the compute dtype.
    # In one row, most gradients are narrow.
    more = 2 * embedding + two.static.gradients - static.gradients
    assert two.memory.peak - one.memory.peak == pytest.approx(PIECES * more, rel=0.05)


def test_frozen_layers_have_no_gradients(seven: Path) -> None:
    found = plan(seven, "partial_llm_full_vit").static
    vision, language = found.layer_gradients
    assert language[:14] == [0.0] * 14
    assert len(set(language[14:])) == len(set(vision)) == 1
    assert sum(vision) + sum(language) < found.gradients
    assert found.ends[0] == 0.0 < found.ends[1]
    # Where nothing trains below them, none flows through them either.
    alone = plan(seven, "partial_llm_full_vit", "--train_vit", "false", "--train_projector", "false")
    assert alone.static.learning == (0, 14)
    assert alone.time.host == pytest.approx(STEP + (32 + 14) * FORWARD + 14 * LAYER)


def test_a_policy_that_moves_pictures_takes_its_room(seven: Path, tmp_path: Path) -> None:
    """Coordinates may become longer when a picture moves, and rows are planned with that."""
    write_data(tmp_path, 24, counts=(1,))
    path = tmp_path / "toy.jsonl"
    path.write_text(path.read_text().replace("describe", 'describe {\\"bbox_2d\\": [1, 2, 8, 9]}'))
    (tmp_path / "model").symlink_to(seven / "model")
    still, moved = (plan(tmp_path, "full", *policy) for policy in ((), ("--augmentation", "geometric")))
    assert (
        moved.data.fitted.length.sum() == still.data.fitted.length.sum() + 8 * 3 * 5
    )  # 8 records, 5 numbers, that of the key too


def test_one_model_serves_all_changes_that_leave_it_as_it_is(seven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, loaded = [], []
    real, real_chat = SkeletonSource.load, Chat.load

    def counted(self: SkeletonSource, **overrides: Any) -> Any:
        made.append(overrides)
        return real(self, **overrides)

    monkeypatch.setattr(SkeletonSource, "load", counted)
    monkeypatch.setattr(Chat, "load", lambda *of: loaded.append(of) or real_chat(*of))
    _chat.cache_clear()
    line = words(seven, "lora", "--lora_rank", "24")
    before = estimate(read_plan(line).run, gpus.by_name("RTX 4090"))
    advice.ladder(line, before, lambda new: read_plan(new).run, lambda one: estimate(one, gpus.by_name("RTX 4090")))
    assert len(made) == 3  # as it is, half the rank, and qlora
    assert len(loaded) == 1


def test_several_gpus_share_what_zero_cuts_up(seven: Path) -> None:
    run = read_plan(words(seven, "full", "--deepspeed", "zero3")).run
    one, four = (estimate(run, gpus.by_name("H100"), world_size=n) for n in (1, 4))
    assert four.memory.states == one.memory.states / 4
    assert four.memory.weights == pytest.approx(one.memory.weights / 4)
    assert not four.memory.holds  # their layers join weights anew for each product


def test_what_is_offloaded_is_not_on_the_gpu(seven: Path) -> None:
    """Only then does `full` of 7B fit into one small GPU."""
    here, away = (plan(seven, "full", "--deepspeed", name, gpu="RTX 4090") for name in ("zero3", "zero3_offload"))
    assert here.memory.states > 80e9
    assert (away.memory.weights, away.memory.states, away.memory.gradients) == (0, 0, 0)
    assert away.fits
    assert not here.fits


def test_time_counts_weights_of_four_bits_and_no_others(seven: Path) -> None:
    """By their number: what a part takes in bytes says little beside an embedding, adapters and shards."""
    found = plan(seven, "qlora")
    layers = 28 * (3584 * (3584 * 2 + 512 * 2) + 3 * 3584 * 18944)
    assert [part.quantised for part in found.static.parts if part.quantised] == [layers]
    eight = estimate(read_plan(words(seven, "full", "--deepspeed", "zero3")).run, gpus.by_name("H100"), world_size=8)
    assert not any(part.quantised for part in eight.static.parts)


@pytest.mark.parametrize("precision", ["fp16", "no"])
def test_what_training_refuses_is_not_planned(seven: Path, precision: str) -> None:
    line = ("--mixed_precision", precision)
    assert {"optim"} not in flags_of(seven, "full", *line)
    with pytest.raises(ConfigError, match="keeps trained weights in bf16"):
        plan(seven, "full", *line, "--optim", "adamw_8bit")


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        pytest.param(
            "full", ("--learning_rate_vit", "1e-5", "--learning_rate_projector", "1e-5"), marks=pytest.mark.slow
        ),
        ("lora_llm_full_vit", ("--learning_rate_vit", "1e-5", "--lora_rank", "32")),
        ("partial_llm_full_vit", ("--llm_frozen_layers", "20", "--learning_rate_llm", "1e-5")),
    ],
)
def test_a_lighter_strategy_leaves_what_it_does_not_take(seven: Path, strategy: str, more: tuple[str, ...]) -> None:
    line = words(seven, strategy, *more)
    found = advice.search(line, read_plan(line).run, lambda new: read_plan(new).run, lambda run: estimate(run, SMALL))
    assert found is not None
    assert "--tuning_strategy qlora" in found.command
    assert found.found.fits


SMALL = replace(gpus.by_name("RTX 4090"), memory=16 * GIB)


@pytest.mark.parametrize(
    ("text", "memory"), [("RTX 4090 24GB", 24), ("A100 40GB", 40), ("h100", 80), ("NVIDIA H100 80GB HBM3", 80)]
)
def test_a_gpu_by_name(text: str, memory: float) -> None:
    found = gpus.by_name(text)
    assert found.memory == pytest.approx(memory * GIB, rel=0.03)
    assert found.bandwidth > 5e11
    assert found.peak > 1e14


def test_an_unknown_gpu_is_named_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"--gpu RTX 4091: .*the nearest is .rtx 4090."):
        gpus.by_name("RTX 4091")


# ---------------------------------------------------------------------------------------------------------------------
# Advice


def flags_of(root: Path, strategy: str, *more: str) -> list[set[str]]:
    run = read_plan(words(root, strategy, *more)).run
    return [set(change.flags) for change in advice.changes(run)]


def test_each_rule_of_advice(seven: Path) -> None:
    assert {"memory"} in flags_of(seven, "full")
    assert {"memory"} not in flags_of(seven, "full", "--memory", "low")
    assert {"memory"} not in flags_of(seven, "full", "--gradient_checkpointing")
    cut = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    assert cut not in flags_of(seven, "full")
    assert cut in flags_of(seven, "full", "--per_device_train_batch_size", "4")
    assert {"optim"} in flags_of(seven, "full")
    assert {"optim"} not in flags_of(seven, "full", "--deepspeed", "zero3")
    assert {"lora_rank"} in flags_of(seven, "lora")
    assert {"lora_rank"} not in flags_of(seven, "lora", "--lora_rank", "8")
    assert {"lora_rank"} not in flags_of(seven, "full")
    assert {"max_pixels"} in flags_of(seven, "full")
    assert {"max_seq_length"} in flags_of(seven, "full")
    assert {"max_seq_length"} not in flags_of(seven, "full", "--max_seq_length", "1024")
    lighter = {
        strategy: next(
            (c.flags["tuning_strategy"] for c in advice.changes(read_plan(words(seven, strategy)).run)
             if "tuning_strategy" in c.flags), None,
        )
        for strategy in STRATEGIES
    }  # fmt: skip
    assert lighter == {
        "full": "lora_llm_full_vit", "partial_llm_full_vit": "lora_llm_full_vit", "vit_only": None, "lora": "qlora",
        "lora_llm_full_vit": "qlora", "qlora": None,
    }  # fmt: skip


def test_a_cut_keeps_the_samples_of_a_step(seven: Path) -> None:
    line = words(seven, "full", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2")
    (change,) = [c for c in advice.changes(read_plan(line).run) if "gradient_accumulation_steps" in c.flags]
    config = read_plan(advice.with_flags(line, change.flags)).run.config
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (1, 8)


def test_flags_take_the_place_of_those_of_their_name() -> None:
    line = ["--a", "1", "--b=2", "--no-c", "--d", "x", "y"]
    assert advice.with_flags(line, {"a": "3", "b": "4"}) == ["--no-c", "--d", "x", "y", "--a", "3", "--b", "4"]
    assert advice.with_flags(line, {"c": None, "d": None}) == ["--a", "1", "--b=2"]


def run_plan(root: Path, strategy: str, *more: str) -> None:
    command = COMMANDS["plan"]
    command.run(parse_command(command, words(root, strategy, *more)))


def test_the_ladder_is_commands_to_paste(seven: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_plan(seven, "full", "--gpu", "H100", "--per_device_train_batch_size", "2")
    said = capsys.readouterr().out
    assert "It does not fit into H100." in said
    commands = [line.strip() for line in said.splitlines() if line.startswith("  accelerate launch")]
    assert len(commands) >= 2
    for one in commands:
        head, rest = shlex.split(one)[:4], shlex.split(one)[4:]
        assert head == ["accelerate", "launch", "-m", "vlft"]
        assert read_plan(rest).run.config.model_name_or_path == str(seven / "model")
    assert any("--optim adamw_8bit" in one for one in commands)
    assert any("--tuning_strategy lora_llm_full_vit" in one for one in commands)


def test_a_goal_is_reached_with_few_changes(seven: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_plan(seven, "lora_llm_full_vit", "--goal", "fit 24GB")
    said = capsys.readouterr().out
    assert "It fits" in said or "This does" in said
    run_plan(seven, "full", "--goal", "fit 24GB")
    said = capsys.readouterr().out
    assert "This does" in said
    assert said.rstrip().splitlines()[-1].startswith("  accelerate launch -m vlft ")
    (command,) = [line.strip() for line in said.splitlines() if line.startswith("  accelerate launch")]
    assert estimate(read_plan(shlex.split(command)[4:]).run, gpus.by_name("RTX 4090")).fits
    run_plan(seven, "full", "--goal", "fit 2GB")
    assert "Nothing that vlft can change makes it fit 2GB" in capsys.readouterr().out


def test_a_goal_that_is_no_goal(seven: Path) -> None:
    with pytest.raises(ConfigError, match="--goal 'fit 24GB'"):
        run_plan(seven, "full", "--goal", "be fast")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_one_must_be_named(seven: Path) -> None:
    with pytest.raises(ConfigError, match=r"name one, e\.g\. --gpu 'RTX 4090 24GB'"):
        run_plan(seven, "full")


def test_histograms_count_everything_in_round_bars() -> None:
    bars = histogram([0, 5, 17, 1000, 999, 250])
    assert sum(n for _, _, n in bars) == 6
    assert bars[0][0] == 0
    assert bars[-1][1] > 1000
    assert all(a % 10 == 0 for a, _, _ in bars)
    assert histogram([]) == []


def in_a_process(script: str, root: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", script, "plan", *words(root, "qlora", "--gpu", "RTX 4090 24GB")]
    return subprocess.run(line, capture_output=True, text=True, check=False)


NEEDLESS = {"torch._inductor.compile_fx": 2.0, "scipy.optimize": 0.5}
"""Modules of libraries that nothing in a plan runs, with the seconds that their imports take."""


def test_it_needs_no_weights_and_says_what_a_run_would_hold(seven: Path) -> None:
    names = "atexit.register(lambda: print('needless:', [m for m in NEEDLESS if m in sys.modules]))"
    done = in_a_process(
        f"import atexit, sys; NEEDLESS = {[*NEEDLESS]}; {names}; from vlft.cli import main; main()", seven
    )
    assert done.returncode == 0, done.stderr
    assert "It fits into RTX 4090 24GB." in done.stdout
    assert "161,480,704" in done.stdout  # published: rank 64 on all seven products of 28 layers
    assert "needless: []" in done.stdout


MARKED = """
import atexit, sys
from vlft.cli import run
class Kept:
    def __del__(self): print("taken apart", flush=True)
kept = Kept()
atexit.register(print, "functions for the end ran")
run()
"""


def test_its_process_ends_when_all_is_written_and_takes_nothing_apart(seven: Path) -> None:
    done = in_a_process(MARKED, seven)
    assert done.returncode == 0, done.stderr
    assert "It fits into RTX 4090 24GB." in done.stdout
    assert done.stdout.endswith("functions for the end ran\n")
    refused = subprocess.run(
        [sys.executable, "-c", MARKED, "plan", "--gpu", "H100"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "--tuning_strategy is missing" in refused.stderr
    other = subprocess.run([sys.executable, "-c", MARKED, "plugins"], capture_output=True, text=True, check=False)
    assert other.stdout.endswith("taken apart\n"), "a command that is not brief ends as Python does"


SAME_NAMES = """
import sys
from vlft.planning.imports import import_libraries
import transformers
if sys.argv[1] == "lean":
    import_libraries()
import transformers.models
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration
from transformers.utils import is_scipy_available
print(len(reads), is_scipy_available(), sorted(dir(transformers.models)), sorted(dir(transformers)))
"""


@pytest.mark.slow
def test_lean_imports_read_less_and_leave_the_same_names() -> None:
    """transformers reads the files of its models for their names: once, where it would read them twice."""
    counted = (
        "import sys; reads = []\nsys.addaudithook(lambda event, of: reads.append(of) if event == 'open' else None)"
    )
    done = {
        way: subprocess.run(
            [sys.executable, "-c", counted + SAME_NAMES, way], capture_output=True, text=True, check=True
        ).stdout.split(maxsplit=1)
        for way in ("lean", "plain")
    }
    assert done["lean"][1] == done["plain"][1]
    assert int(done["lean"][0]) < 0.8 * int(done["plain"][0])


class Drawn:
    """A strategy whose adapters are the results of PyTorch's draws."""

    def prepare_model(self, source: SkeletonSource) -> nn.Module:
        model = source.load()
        model.requires_grad_(False)
        model.adapter = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(3, 5), a=2))
        model.numbers = nn.init.normal_(torch.empty(2), std=0.1)
        return model

    def param_groups(self, model: nn.Module) -> list[ParamGroup]:
        return [ParamGroup("adapters", ("adapter",), "llm")]


def test_a_skeleton_draws_nothing(seven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = {name: each for name, each in vars(nn.init).items() if name.endswith("_")}
    monkeypatch.setattr(torch.Tensor, "uniform_", None)
    monkeypatch.setattr(torch.Tensor, "normal_", None)
    checkpoint = open_checkpoint(str(seven / "model"), weights=False)
    source = SkeletonSource(checkpoint, load_config(checkpoint), torch.bfloat16, torch.device("meta"))
    model: Any = prepared(cast("Strategy", Drawn()), source)[0]
    assert model.adapter.shape == (3, 5)
    assert model.numbers.shape == (2,)
    assert {name: each for name, each in vars(nn.init).items() if name.endswith("_")} == draws
