"""Do the fast paths learn as they should? Loss of a small model on the demo's data, by each of them.

    python bench/convergence.py [--steps 300] [--batch 32] [--out runs/bench]

`vlft` as it is, `vlft --reference`, and plain Hugging Face code: padded batches of the same samples in the same order,
the model's own loss, torch's AdamW at the same rates. On a GPU in bf16 over fp32 weights, on a CPU in fp32. A fourth
curve, `blind`, is the plain code with every picture black: as far as it runs from the others, and no further, they tell
something of the vision tower. --start base begins with the demo's trained model, which sees from the first step. The
curves go to OUT/convergence.json; stdout has their differences, of losses smoothed over some steps and as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import workload

CURVES = ("vlft", "reference", "huggingface", "blind")
PAIRS = (("vlft", "reference"), ("vlft", "huggingface"), ("reference", "huggingface"), ("huggingface", "blind"))
RATE = "1.5e-3"
NOT_LEARNT = -100


def make_workload(root: Path, pictures: int, start: str) -> tuple[Path, Path]:
    """The demo's model, before or after it was taught the base's world, and the demo's data; made once."""
    import torch
    from transformers import AutoModelForImageTextToText

    from demo import draw, make_base

    folder, registry = root / "model", root / f"data-{pictures}" / "dataset_config.json"
    if start == "base":
        folder = workload.ROOT / "demo" / "base"
    elif not (folder / "preprocessor_config.json").exists():
        torch.manual_seed(0)
        tokenizer = make_base.make_tokenizer()
        model = AutoModelForImageTextToText.from_config(make_base.make_config(tokenizer))
        make_base.initialise(model)
        make_base.save(model, tokenizer, folder)
    if not registry.exists():
        draw.write_demo(registry.parent, pictures, 1)
    return folder, registry


# ---------------------------------------------------------------------------------------------------------------------
# Ours: also writes which samples each step had, and its rates
# ---------------------------------------------------------------------------------------------------------------------


def by_vlft(given: argparse.Namespace, *, reference: bool) -> dict[str, Any]:
    from vlft import train
    from vlft.config import RunConfig, options_of
    from vlft.parse import parse

    if reference and "reference" not in options_of(RunConfig):
        return {"note": "this vlft has no --reference"}
    folder, registry = make_workload(given.root, given.pictures, given.start)
    output = given.root / "run"
    shutil.rmtree(output, ignore_errors=True)
    words = ["--model_name_or_path", str(folder), "--dataset_config_path", str(registry), "--dataset_names", "shapes"]
    words += ["--output_dir", str(output), "--tuning_strategy", "full", "--cache_dir", str(given.root / "cache")]
    words += ["--per_device_train_batch_size", str(given.batch), "--max_steps", str(given.steps), "--report", "false"]
    words += ["--num_workers", str(given.workers), "--train_split_ratio", "1", "--save_steps", "1000000"]
    words += [w for part in ("llm", "vit", "projector") for w in (f"--learning_rate_{part}", RATE)]
    words += ["--reference"] if reference else []
    members: list[list[str]] = []
    real = train.train_step

    def noted(job: Any, step: Any) -> dict[str, Any]:
        members.append([job.data.index.sample_id(i) for row in step.rows for i in row.sample_ids])
        return real(job, step)

    train.train_step = noted
    train.save_checkpoint = lambda _: None
    train.hand_over = lambda _: None
    config = parse(words)
    train.main(config)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    return {
        "loss": [line["loss"] for line in lines], "rates": [line["learning_rate"] for line in lines],
        "supervised": [line["supervised_tokens"] for line in lines], "members": members,
        "weight_decay": config.config.weight_decay, "max_grad_norm": config.config.max_grad_norm,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Plain Hugging Face code
# ---------------------------------------------------------------------------------------------------------------------


class Batches:
    """Padded batches of records by their ids."""

    def __init__(self, folder: Path, registry: Path) -> None:
        self.processor = workload.processor(folder)
        self.tokenizer = self.processor.tokenizer
        self.pictures = registry.parent / "pictures"
        lines = (registry.parent / "train.jsonl").read_text().splitlines()
        self.records = {record["id"]: record["messages"] for record in map(json.loads, lines)}
        self.opening = self.tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
        self.end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def __call__(self, names: list[str]) -> dict[str, Any]:
        from PIL import Image

        talks = [self.records[name] for name in names]
        texts = [self.processor.apply_chat_template(talk, tokenize=False) for talk in talks]
        images = [Image.open(self.pictures / talk[0]["content"][0]["image"]) for talk in talks]
        made = dict(self.processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt"))
        made["labels"] = made["input_ids"].clone()
        for row in made["labels"]:
            row[~self._answers(row.tolist(), row)] = NOT_LEARNT
        made["mm_token_type_ids"] = (made["input_ids"] == self.processor.image_token_id).int()
        return made

    def _answers(self, ids: list[int], like: Any) -> Any:
        """From behind each opening of an answer to its end token."""
        import torch

        learnt, n, at = torch.zeros_like(like, dtype=torch.bool), len(self.opening), 0
        while at < len(ids):
            if ids[at : at + n] == self.opening:
                end = ids.index(self.end, at + n)
                learnt[at + n : end + 1] = True
                at = end
            at += 1
        return learnt


def part_of(name: str) -> str:
    return "projector" if ".merger." in name else "vit" if ".visual." in name else "llm"


def by_huggingface(given: argparse.Namespace, *, blind: bool) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForImageTextToText

    ours = json.loads((given.root / "vlft.json").read_text())
    folder, registry = make_workload(given.root, given.pictures, given.start)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.to(device).train()
    groups: dict[tuple[str, bool], list[Any]] = {}
    for name, p in model.named_parameters():
        groups.setdefault((part_of(name), p.ndim > 1), []).append(p)
    optimizer = torch.optim.AdamW(
        {"params": some, "part": part, "weight_decay": ours["weight_decay"] if decays else 0.0}
        for (part, decays), some in groups.items()
    )
    batches, losses, supervised = Batches(folder, registry), [], []
    for members, rates in zip(ours["members"], ours["rates"], strict=True):
        batch = {name: value.to(device) for name, value in batches(members).items()}
        if blind:
            batch["pixel_values"].zero_()
        for group in optimizer.param_groups:
            group["lr"] = rates[group["part"]]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), ours["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        supervised.append(int((batch["labels"][:, 1:] != NOT_LEARNT).sum()))
    return {"loss": losses, "supervised": supervised, "device": device}


# ---------------------------------------------------------------------------------------------------------------------
# Differences
# ---------------------------------------------------------------------------------------------------------------------


def smooth(values: list[float], width: int) -> list[float]:
    return [sum(values[i : i + width]) / width for i in range(len(values) - width + 1)]


def differences(curves: dict[str, dict[str, Any]], width: int) -> dict[str, Any]:
    """Of each pair of curves: largest and mean difference of smoothed losses, of single ones, and of the first 50."""
    found: dict[str, Any] = {}
    for a, b in PAIRS:
        if "loss" not in curves.get(a, {}) or "loss" not in curves.get(b, {}):
            continue
        one, two = curves[a]["loss"], curves[b]["loss"]
        gaps = [abs(x - y) for x, y in zip(smooth(one, width), smooth(two, width), strict=True)]
        single = [abs(x - y) for x, y in zip(one, two, strict=True)]
        found[f"{a} - {b}"] = {
            "smoothed_max": max(gaps), "smoothed_mean": sum(gaps) / len(gaps), "single_max": max(single),
            "single_max_50": max(single[:50]), "same_tokens": curves[a]["supervised"] == curves[b]["supervised"],
        }  # fmt: skip
    return found


def child(name: str, given: argparse.Namespace) -> None:
    if name in ("huggingface", "blind"):
        made = by_huggingface(given, blind=name == "blind")
    else:
        made = by_vlft(given, reference=name == "reference")
    (given.root / f"{name}.json").write_text(json.dumps(made))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pictures", type=int, default=3000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--smooth", type=int, default=20, help="steps that a smoothed loss is the mean of")
    parser.add_argument("--start", choices=("scratch", "base"), default="scratch")
    parser.add_argument("--curves", default=",".join(CURVES), help="others are taken from the last time")
    parser.add_argument("--root", type=Path, default=Path("/tmp/vlft_bench/convergence"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    for folder in (given.root, given.out):
        folder.mkdir(parents=True, exist_ok=True)
    if given.one:
        child(given.one, given)
        return
    shared = [f"--{k}={getattr(given, k)}" for k in ("steps", "batch", "pictures", "workers", "root", "out", "start")]
    known = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join([str(workload.ROOT), str(workload.ROOT / "plugins"), *([known] if known else [])])
    for name in given.curves.split(","):
        env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        words = [sys.executable, __file__, "--one", name, *shared]
        subprocess.run(words, check=True, env=env, stdout=sys.stderr)
    curves = {
        name: json.loads((given.root / f"{name}.json").read_text())
        for name in CURVES
        if (given.root / f"{name}.json").exists()
    }
    found = {"steps": given.steps, "smoothed_over": given.smooth, **differences(curves, given.smooth)}
    for curve in curves.values():
        curve.pop("members", None)
    (given.out / "convergence.json").write_text(json.dumps({**found, "curves": curves}))
    last = {f"last_{n}": round(smooth(c["loss"], given.smooth)[-1], 5) for n, c in curves.items() if "loss" in c}
    print(json.dumps({**found, **last, **{n: c["note"] for n, c in curves.items() if "note" in c}}))


if __name__ == "__main__":
    main()
