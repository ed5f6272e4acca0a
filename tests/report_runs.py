"""Run folders for the report's tests and screenshots, written by hand: no model, no torch, a fraction of a second."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw

PARTS = ("vit", "projector", "llm")
QUESTIONS = (
    (
        "invoices",
        "total",
        "What is the total amount due on this invoice?",
        "1,284.50 EUR",
        "The invoice shows a total.",
    ),
    ("invoices", "due", "When is the payment due?", "30 April 2026", "30 April 2026"),
    ("parts", "gasket", "Locate the gasket.", "(180,260),(520,700)", "(90,120),(800,910)"),
    (
        "parts",
        "screw",
        "Where is the screw? Answer in JSON.",
        '[{"bbox_2d": [610, 180, 900, 420], "label": "screw"}]',
        "There is a screw on the right.",
    ),
    ("charts", "2021", "Which year has the highest bar, and how high is it?", "2021, with 48", "2019, with 30"),
    (
        "charts",
        "pair",
        "In which of the two pictures do the sales fall?",
        "In the second.",
        "Both pictures show charts.",
    ),
)


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _metrics(steps: int, every: int, seed: int, floor: float) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    lines = [{"schema": 1, "step": 0, "kind": "eval", **_eval(0.0, floor, rng), "perf": {"eval_seconds": 21.4}}]
    for step in range(1, steps + 1):
        done = step / steps
        rate = min(1.0, done / 0.06) * 0.5 * (1 + math.cos(math.pi * done))
        loss = floor + 2.1 * math.exp(-6 * done) + 0.09 * rng.standard_normal() * (1.2 - done)
        norms = {
            part: abs(k * (0.4 + math.exp(-4 * done)) * rng.lognormal(0, 0.35))
            for part, k in zip(PARTS, (0.6, 0.9, 1.7), strict=True)
        }
        tokens, seconds = int(rng.integers(15_000, 19_000)), 0.62 + 0.05 * rng.random() + (3 if step == 1 else 0)
        wait = 0.004 + 0.01 * rng.random()
        lines.append(
            {
                "schema": 1,
                "step": step,
                "kind": "train",
                "loss": loss,
                "skipped": None,
                "dataset_loss": {
                    n: loss + d + 0.05 * rng.standard_normal()
                    for n, d in (("invoices", -0.12), ("parts", 0.2), ("charts", 0.05))
                },
                "grad_norm": math.hypot(*norms.values()),
                "grad_norms": norms,
                "padding": 0.0,
                "learning_rate": {"vit": 2e-6 * rate, "projector": 1e-5 * rate, "llm": 1e-5 * rate},
                "tokens": tokens,
                "supervised_tokens": tokens // 9,
                "samples": 32,
                "images": 41,
                "epoch": 3 * done,
                "perf": {
                    "step_seconds": seconds,
                    "data_wait_seconds": wait,
                    "tokens_per_second": tokens / (seconds + wait),
                    "samples_per_second": 32 / (seconds + wait),
                    "mfu": 0.43 * 0.66 / (seconds + wait),
                    "peak_memory_gib": 57.2 + 3 * min(1, done * 5),
                },
            }
        )
        if step % every == 0:
            lines.append(
                {"schema": 1, "step": step, "kind": "eval", **_eval(done, floor, rng), "perf": {"eval_seconds": 21.4}}
            )
    return lines


def _eval(done: float, floor: float, rng: Any) -> dict[str, float]:
    over = 0.22 * max(0.0, done - 0.65)
    noise = rng.standard_normal(6) * 0.008
    return {
        "eval/invoices/loss": floor - 0.05 + 1.7 * math.exp(-5 * done) + over + noise[0],
        "eval/parts/loss": floor + 0.25 + 1.9 * math.exp(-4 * done) + over + noise[1],
        "eval/charts/loss": floor + 0.1 + 1.5 * math.exp(-6 * done) + 1.6 * over + noise[2],
        "eval/invoices/exact_match/exact_match": 0.94 - floor / 4 - 0.6 * math.exp(-5 * done) - over / 3 + noise[3],
        "eval/charts/exact_match/exact_match": 0.81 - floor / 4 - 0.5 * math.exp(-4 * done) - over / 2 + noise[4],
        "eval/parts/box_iou/mean_iou": 0.86 - floor / 4 - 0.66 * math.exp(-4 * done) - over / 4 + noise[5],
    }


def _picture(path: Path, kind: str, which: int) -> tuple[int, int]:
    """A thumbnail with something to see, and the size that the model would see."""
    width, height = (420, 560) if kind == "invoices" else (560, 420)
    image = Image.new("RGB", (width, height), (238, 234, 226))
    draw = ImageDraw.Draw(image)
    if kind == "invoices":
        draw.rectangle((24, 24, 150, 60), fill=(60, 84, 120))
        for i in range(9):
            draw.line((24, 120 + 34 * i, 396, 120 + 34 * i), fill=(190, 184, 174), width=2)
            draw.rectangle((30, 128 + 34 * i, 120 + (i * 37) % 110, 138 + 34 * i), fill=(120, 116, 110))
            draw.rectangle((330, 128 + 34 * i, 390, 138 + 34 * i), fill=(120, 116, 110))
        draw.rectangle((300, 470, 396, 500), fill=(60, 84, 120))
    elif kind == "parts":
        draw.rectangle((0, 0, width, height), fill=(196, 190, 178))
        draw.ellipse((100, 110, 292, 294), fill=(72, 78, 86))
        draw.ellipse((150, 158, 242, 246), fill=(196, 190, 178))
        draw.rectangle((344, 84, 500, 112), fill=(150, 120, 60))
        draw.rectangle((400, 110, 440, 172), fill=(150, 120, 60))
    else:
        for i, tall in enumerate((120, 190, 150, 300, 210) if which == 0 else (300, 240, 200, 130, 90)):
            draw.rectangle(
                (70 + 92 * i, 380 - tall, 130 + 92 * i, 380), fill=(66, 110, 150) if i != 3 else (190, 96, 60)
            )
        draw.line((50, 380, 530, 380), fill=(80, 80, 80), width=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "JPEG", quality=80)
    return 2 * width, 2 * height


def _gallery(root: Path, last: int, good: float) -> None:
    samples, first, after = [], {}, {}
    for i, (dataset, name, question, reference, before) in enumerate(QUESTIONS):
        pictures = []
        for k in range(2 if name == "pair" else 1):
            file = f"{i:04d}-{k}.jpg"
            width, height = _picture(root / "gallery" / file, dataset, k)
            pictures.append({"file": file, "width": width, "height": height})
        samples.append(
            {"dataset": dataset, "id": name, "question": question, "reference": reference, "pictures": pictures}
        )
        common = {"id": name, "question": question, "reference": reference, "images": []}
        first.setdefault(dataset, []).append(common | {"prediction": before})
        off = round(40 * (1 - good))
        said = {
            "gasket": f"({180 + off},{270 - off}),({528 + off},{690 + off})",
            "screw": f'[{{"bbox_2d": [{604 + off}, 186, 893, {428 + off}], "label": "screw"}}]',
            "2021": "2021, with 48" if good > 0.5 else "2021, with 46",
        }
        after.setdefault(dataset, []).append(common | {"prediction": said.get(name, reference)})
    _write(root / "gallery" / "gallery.json", {"schema": 1, "boxes": "relative1000", "samples": samples})
    for step, answers in ((0, first), (last, after)):
        for dataset, lines in answers.items():
            _lines(root / "eval" / f"step-{step:06d}" / f"{dataset}.jsonl", lines)


def write_run(
    root: Path, *, steps: int = 1200, seed: int = 0, floor: float = 0.42, good: float = 0.9, **options: Any
) -> Path:
    """A finished run of `steps` steps with everything that a run can leave."""
    root.mkdir(parents=True, exist_ok=True)
    every = max(1, steps // 12)
    chosen = {
        "schema": 1,
        "model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct",
        "output_dir": str(root),
        "tuning_strategy": "lora_llm_full_vit",
        "dataset_config_path": "data/registry.json",
        "dataset_names": None,
        "epochs": 3.0,
        "max_steps": steps,
        "seed": 42,
        "learning_rate_llm": 1e-5,
        "learning_rate_vit": 2e-6,
        "learning_rate_projector": 1e-5,
        "save_steps": every,
        "save_total_limit": 3,
        "lora_rank": 64,
        "lora_alpha": 16.0,
        "use_data_augmentation": True,
        **options,
    }
    (root / "run.yaml").write_text(yaml.safe_dump(chosen, sort_keys=False))
    words = ["vlft"] + [w for k, v in chosen.items() if k != "schema" and v is not None for w in (f"--{k}", str(v))]
    _write(
        root / "run_card.json",
        {
            "schema": 1,
            "versions": {
                "vlft": "0.1.0",
                "torch": "2.13.0",
                "transformers": "5.23.0",
                "accelerate": "1.15.0",
                "peft": "0.21.2",
                "kornia": "0.9.0",
                "python": "3.11.7",
            },
            "device": "NVIDIA H100 80GB HBM3",
            "git_commit": "41defba0a64f410b191faed7b8be8537096fb487",
            "command": words,
            "strategy": chosen["tuning_strategy"],
            "distribution": "vlft 0.1.0",
            "seed": 42,
            "mixed_precision": "bf16",
            "world_size": 1,
            "distributed_type": "NO",
            "global_batch": 32,
            "trust_remote_code": False,
            "dtypes": ["torch.float32", "torch.bfloat16"],
        },
    )
    lines = _metrics(steps, every, seed, floor)
    _lines(root / "metrics.jsonl", lines)
    _lines(
        root / "ledger.jsonl",
        [
            {
                "dataset": "invoices",
                "id": "inv-0119",
                "reason": "image_missing",
                "message": "images/0119.png is not there.",
                "step": 0,
            },
            {
                "dataset": "invoices",
                "id": "inv-0344",
                "reason": "image_missing",
                "message": "images/0344.png is not there.",
                "step": 0,
            },
            {
                "dataset": "charts",
                "id": "c-77",
                "reason": "too_long",
                "message": "3,112 tokens do not fit into --max_seq_length 2048.",
                "step": 0,
            },
            {"dataset": "parts", "id": "p-9", "reason": "not_finite", "message": "its loss is not finite", "step": 412},
        ],
    )
    rng = np.random.default_rng(7)
    tokens, t_edges = np.histogram(rng.lognormal(6.3, 0.45, 12_800).clip(0, 2048), 24, (0, 2048))
    sizes, s_edges = np.histogram(rng.gamma(4, 0.14, 16_000).clip(0, 1.4), 24, (0, 1.4))
    _write(
        root / "data.json",
        {
            "schema": 1,
            "datasets": {
                "invoices": {"train": 6120, "held_out": 320},
                "parts": {"train": 4022, "held_out": 210},
                "charts": {"train": 2658, "held_out": 140},
            },
            "tokens": {"edges": t_edges.tolist(), "counts": tokens.tolist()},
            "pictures": {"edges": s_edges.tolist(), "counts": sizes.tolist()},
            "pictures_per_sample": {"0": 600, "1": 9400, "2": 2100, "3": 700},
            "unused": {"image_missing": 2, "too_long": 1},
        },
    )
    metric = "eval/parts/box_iou/mean_iou"
    value, step = max((line[metric], line["step"]) for line in lines if line["kind"] == "eval")
    _write(root / "best.json", {"schema": 1, "metric": metric, "step": step, "value": value})
    _gallery(root, step, good)
    for kept in sorted({steps, step, every * 11}):
        _write(
            root / "checkpoints" / f"step-{kept:06d}" / "state.json",
            {"schema": 1, "step": kept, "proved": {"vit": [1, 390, 390], "projector": [1, 5, 5], "llm": [1, 392, 392]}},
        )
    (root / "model").mkdir(exist_ok=True)
    return root
