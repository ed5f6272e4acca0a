"""Engines and precisions that only a GPU has: fp16 with its scaler, ZeRO in bf16, augmentation and pinned memory.

python -m pytest tests/gpu -n 8
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import CPU_ADAM, FSDP, command, environment, final_weights, ledger, metrics, start, write_data
from safetensors.torch import load_file

from vlft.allocator import CONTEXT

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
RATES = {f"learning_rate_{p}": 4e-4 for p in ("llm", "vit", "projector")}


def test_fp16_follows_the_cpus_curve(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry = write_data(tmp_path)
    start(command(tiny(), registry, tmp_path / "gpu", "full", mixed_precision="fp16", max_steps=8, **RATES))
    cpu = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    start(command(tiny(), registry, tmp_path / "cpu", "full", mixed_precision="no", max_steps=8, **RATES), **cpu)
    gpu, cpu_curve = ([line["loss"] for line in metrics(tmp_path / out)] for out in ("gpu", "cpu"))
    print("fp16", gpu, cpu_curve)
    # The scaler starts high and skips steps until it fits, so only the first loss and the fall are the same.
    assert gpu[0] == pytest.approx(cpu_curve[0], rel=0.01)
    assert gpu[-1] < gpu[0]


@pytest.mark.parametrize("layout", [None, "zero2", "zero3"])
@pytest.mark.parametrize("strategy", ["full", "qlora"])
def test_a_layout_trains_saves_and_resumes_in_bf16(
    tiny: Callable[..., Path], tmp_path: Path, layout: str | None, strategy: str
) -> None:
    registry = write_data(tmp_path)
    rates = RATES if strategy == "full" else {"learning_rate_llm": 4e-4, "lora_dropout": 0.0}
    model = tiny(dtype="bfloat16")

    def go(out: str, **more: Any) -> None:
        options = {"deepspeed": layout, "save_steps": 3, "lr_scheduler_type": "constant", "warmup_steps": 0}
        start(command(model, registry, tmp_path / out, strategy, **(options | {"max_steps": 6} | rates | more)))

    go("whole")
    go("cut", max_steps=3)
    go("cut", resume_from_checkpoint="latest")
    whole, cut = ([line["loss"] for line in metrics(tmp_path / out)] for out in ("whole", "cut"))
    card = json.loads((tmp_path / "whole" / "run_card.json").read_text())
    print(layout, strategy, card["distributed_type"], whole, cut)
    assert card["distributed_type"] == ("DEEPSPEED" if layout else "NO")
    assert whole == pytest.approx(cut, rel=0.01)
    a, b = final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut")
    assert a.keys() == b.keys()


def test_zero2s_sums_beside_the_backward_are_those_behind_it(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Buckets are filled again, and weights that are larger than one let go of, while they are still being summed."""
    registry, model, curves = write_data(tmp_path), tiny(dtype="bfloat16"), {}
    for overlap in (True, False):
        zero = {"stage": 2, "overlap_comm": overlap, "contiguous_gradients": True, "reduce_bucket_size": 4000}
        file = tmp_path / f"{overlap}.json"
        file.write_text(json.dumps({"zero_optimization": zero}))
        options = {"deepspeed": file, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
        start(command(model, registry, tmp_path / str(overlap), "full", max_steps=6, **options, **RATES))
        lines = metrics(tmp_path / str(overlap))
        curves[overlap] = [line["loss"] for line in lines], [line["grad_norm"] for line in lines]
    print("overlap", curves)
    for beside, behind in zip(curves[True], curves[False], strict=True):
        assert beside == pytest.approx(behind, rel=2e-3)


def test_zero3s_layers_train_as_deepspeed_trains_them(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry, model, curves = write_data(tmp_path), tiny(dtype="bfloat16"), []
    file = tmp_path / "zero3.json"
    zero = {"stage": 3, "overlap_comm": True, "stage3_param_persistence_threshold": 100}
    file.write_text(json.dumps({"zero_optimization": zero}))
    for fault in ("layers_by_weights", "no_layer_by_weights"):
        options = {"deepspeed": file, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
        line = command(model, registry, tmp_path / fault, "full", max_steps=6, **options, **RATES)
        start(line, fault={"kind": fault})
        lines = metrics(tmp_path / fault)
        curves.append(([line["loss"] for line in lines], [line["grad_norm"] for line in lines]))
    print("layers", curves)
    for theirs, ours in zip(*curves, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)


OFFLOAD = pytest.param(
    "zero3_offload",
    marks=pytest.mark.skipif(not CPU_ADAM, reason="DeepSpeed compiles its CPU Adam at first use, for minutes"),
)


@pytest.mark.parametrize("layout", [None, "zero2", "zero3", OFFLOAD])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_norms_of_parts_are_unscaled(
    tiny: Callable[..., Path], tmp_path: Path, layout: str | None, precision: str
) -> None:
    """The squares sum to the whole norm's square, and that is one of fp32 on the CPU, not 65536 times it."""
    registry = write_data(tmp_path)
    options = {"max_steps": 24, "lr_scheduler_type": "constant", "warmup_steps": 0} | dict.fromkeys(RATES, 1e-7)
    start(command(tiny(), registry, tmp_path / "gpu", "full", mixed_precision=precision, deepspeed=layout, **options))
    cpu = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    start(command(tiny(), registry, tmp_path / "cpu", "full", mixed_precision="no", **options), **cpu)
    done = [line for line in metrics(tmp_path / "gpu") if line["skipped"] is None]
    assert len(done) >= 3
    whole = {line["step"]: line["grad_norms"] for line in metrics(tmp_path / "cpu")}
    for line in done:
        squares = sum(norm**2 for norm in line["grad_norms"].values())
        assert squares == pytest.approx(line["grad_norm"] ** 2, rel=1e-3)
        near = {part: pytest.approx(norm, rel=0.2) for part, norm in whole[line["step"]].items()}
        assert line["grad_norms"] == near


@pytest.mark.parametrize(
    ("strategy", "offload"), [("full", False), ("lora_llm_full_vit", False), ("qlora", False), ("full", True)]
)
def test_fsdp2_trains_saves_resumes_and_exports_in_bf16(
    tiny: Callable[..., Path], tmp_path: Path, strategy: str, offload: bool
) -> None:
    registry = write_data(tmp_path)
    cut_up = FSDP | ({"FSDP_OFFLOAD_PARAMS": "true"} if offload else {})
    rates = RATES if strategy != "qlora" else {"learning_rate_llm": 4e-4}
    more = {} if strategy == "full" else {"lora_dropout": 0.0}
    model = tiny(dtype="bfloat16")
    fixed = {"save_steps": 3, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 6} | rates | more
    start(command(model, registry, tmp_path / "plain", strategy, **fixed))
    start(command(model, registry, tmp_path / "whole", strategy, **fixed), **cut_up)
    start(command(model, registry, tmp_path / "cut", strategy, **(fixed | {"max_steps": 3})), **cut_up)
    start(command(model, registry, tmp_path / "cut", strategy, **fixed, resume_from_checkpoint="latest"), **cut_up)
    plain, whole, cut = ([line["loss"] for line in metrics(tmp_path / out)] for out in ("plain", "whole", "cut"))
    card = json.loads((tmp_path / "whole/run_card.json").read_text())
    print("fsdp2", strategy, card["distributed_type"], plain, whole, cut)
    assert card["distributed_type"] == "FSDP"
    assert whole[0] == pytest.approx(plain[0], rel=1e-4)  # packed weights that were cut up were no longer the same
    assert whole == pytest.approx(plain, rel=0.02)
    assert whole == pytest.approx(cut, rel=0.01)
    a, b = (load_file(next((tmp_path / run / "model").glob("*model.safetensors"))) for run in ("plain", "whole"))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[n].float(), b[n].float(), atol=0.02) for n in a)


def test_segments_expand_although_torch_was_there_first() -> None:
    """A program that imports torch itself and calls `vlft.train.main`: CUDA starts after the engine does."""
    code = (
        "import torch; from vlft.engine import start_engine; start_engine('bf16'); x = torch.ones(9 << 20).cuda(); "
        "print([one['is_expandable'] for one in torch.cuda.memory_snapshot()])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    found = done.stdout.splitlines()[-1]
    assert "True" in found
    assert "False" not in found


@pytest.mark.parametrize("plan", ["all", "auto"])
def test_a_real_out_of_memory_is_recovered(tiny: Callable[..., Path], tmp_path: Path, plan: str) -> None:
    """The process may use a small part of the GPU: rows of some samples do not fit, and one sample not even alone.

    `auto` reckons with the whole GPU, so that layers keep too much until they have learnt.
    """
    registry = write_data(tmp_path, 40)
    lines = (tmp_path / "toy.jsonl").read_text().splitlines()
    giant = json.loads(lines[5])
    giant["id"] = "giant"
    giant["messages"][-1]["content"] = "the picture is red " * 9000
    (tmp_path / "toy.jsonl").write_text("\n".join([*lines, json.dumps(giant)]) + "\n")
    limited = {"kind": "gpu_share", "gib": 0.12}
    options = {"per_device_train_batch_size": 8, "max_seq_length": 60_000}
    options |= {"epochs": 2, "max_steps": None, "max_bad_fraction": 0.1, "mixed_precision": "bf16"}
    words = command(tiny(), registry, tmp_path / "out", "full", **options, **RATES)
    done = start([*words, "--no-gradient_checkpointing"] if plan == "all" else words, fault=limited)
    print(done.stdout)
    assert "out of memory in step" in done.stdout
    assert ("layers keep less of a row" in done.stdout) == (plan == "auto")
    found = ledger(tmp_path / "out")
    assert [(line["id"], line["reason"]) for line in found] == [("giant", "out_of_memory")]
    assert sum(line["samples"] for line in metrics(tmp_path / "out")) == 2 * 40


def test_a_run_stays_within_the_size_that_it_is_given(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """`all` needs more than that; the context, which is not counted, less than what is set aside for it.

    Text alone, and much of it: pixels are so wide beside a tiny model's layers that the peak would be theirs.
    """
    registry = write_data(tmp_path, 1200, counts=(0,))
    options = {"per_device_train_batch_size": 1200, "mixed_precision": "bf16", "max_steps": 2} | RATES

    def peak(memory: str) -> float:
        out = tmp_path / memory
        start(command(tiny(), registry, out, "full", memory=memory, **options))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return float(max(line["perf"]["peak_memory_gib"] for line in lines))

    everything, least = peak("all"), peak("low")
    middle = (everything + least) / 2
    found = peak(f"{middle + CONTEXT / 2**30:.4f}GiB")
    print(everything, least, middle, found)
    assert found <= middle < everything


@pytest.mark.parametrize("kind", ["photometric", "geometric"])
def test_augmentation_on_the_device_is_seeded(tiny: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    registry = write_data(tmp_path)
    for out in ("a", "b"):
        options = {"augmentation": kind, "num_workers": 2, "mixed_precision": "no"}
        start(command(tiny(), registry, tmp_path / out, "lora_llm_full_vit", lora_dropout=0.0, **options))
    losses = [[line["loss"] for line in metrics(tmp_path / out)] for out in ("a", "b")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
