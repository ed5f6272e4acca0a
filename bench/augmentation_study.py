"""Does augmentation help on little data? Five seeds of a small set of the demo's family, with and without.

    python bench/augmentation_study.py        # five seeds, two arms: the table of docs/augmentation.md
    python bench/augmentation_study.py --seeds 2 --arms none,geometric,photometric --steps 40

Each seed draws its own training pictures: shapes whose colours and numbers are asked for (demo/draw.py), and words that
are to be read. The held-out pictures are the same for all. Every run is the real program, `python -m vlft`, on the
demo's base model, for the same number of steps; its own evaluation answers and scores the held-out questions. Lines go
to OUT/lines.jsonl, one a run, so that a study that was cut off goes on where it was; then the table is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from demo import draw

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("red", "blue", "ring", "star")
HELD_OUT_WORDS = 60_000_000
"""Seeds far from those of every training picture."""
SETS = {"held_out": "shapes: colour, number", "held_out_words": "words: reading"}


def options() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--arms", default="none,geometric", help="policies of --augmentation; none: without")
    made.add_argument("--first", type=int, default=1, help="first seed")
    made.add_argument("--seeds", type=int, default=5, help="last seed")
    made.add_argument("--pictures", type=int, default=120, help="training pictures of shapes")
    made.add_argument("--words", type=int, default=120, help="training pictures of words")
    made.add_argument("--held_out", type=int, default=200, help="held-out pictures of each kind")
    made.add_argument("--steps", type=int, default=300, help="optimizer steps of a run")
    made.add_argument("--batch", type=int, default=32, help="samples of a step")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--out", type=Path, default=Path("runs/augmentation"))
    return made.parse_args()


def word_picture(seed: int) -> tuple[Image.Image, str]:
    """A word on a blank page, somewhere, in a size and an ink of its own."""
    rng = random.Random(f"word {seed}")
    word = rng.choice(WORDS)
    paper = np.full((draw.SIDE, draw.SIDE, 3), rng.randint(225, 252), np.uint8)
    page = Image.fromarray(paper)
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(rng.uniform(32, 40))
    left, top, right, bottom = pen.textbbox((0, 0), word, font=font)
    x = rng.uniform(2, draw.SIDE - 2 - (right - left)) - left
    y = rng.uniform(2, draw.SIDE - 2 - (bottom - top)) - top
    pen.text((x, y), word, font=font, fill=tuple(rng.randint(0, 90) for _ in range(3)))
    noise = np.random.default_rng(seed).integers(-4, 5, paper.shape)
    return Image.fromarray((np.asarray(page, np.int16) + noise).clip(0, 255).astype(np.uint8)), word


def write_words(folder: Path, name: str, first_seed: int, n: int) -> None:
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for k in range(n):
            picture, word = word_picture(first_seed + k)
            picture.save(folder / "pictures" / f"{name}-{k:05}.png")
            content = [{"type": "image", "image": f"{name}-{k:05}.png"}, {"type": "text", "text": "Read the word."}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": word}]
            file.write(json.dumps({"id": f"{name}-{k}", "messages": messages}) + "\n")


def write_data(folder: Path, seed: int, chosen: argparse.Namespace) -> Path:
    """The training pictures of a seed, the held-out ones, and their registry."""
    registry = draw.write_demo(folder, chosen.pictures, chosen.held_out, seed)
    write_words(folder, "words", seed * chosen.words, chosen.words)
    write_words(folder, "held_out_words", HELD_OUT_WORDS, chosen.held_out)
    known = json.loads(registry.read_text())
    for name, side in (("words", "train"), ("held_out_words", "eval")):
        known["datasets"][name] = {"json_path": f"{name}.jsonl", "image_root": "pictures", "split": side}
    registry.write_text(json.dumps(known))
    return registry


def run(arm: str, seed: int, chosen: argparse.Namespace) -> dict[str, object]:
    """One training; its line."""
    folder, output = chosen.out / f"data-{seed}", chosen.out / f"run-{arm}-{seed}"
    registry = folder / "dataset_config.json"
    if not registry.exists():
        write_data(folder, seed, chosen)
    shutil.rmtree(output, ignore_errors=True)
    words = {
        "model_name_or_path": ROOT / "demo/base", "output_dir": output, "dataset_config_path": registry,
        "cache_dir": chosen.out / "cache", "tuning_strategy": "lora_llm_full_vit", "lora_rank": 32, "lora_alpha": 64,
        "lora_dropout": 0, "learning_rate_llm": "2e-3", "learning_rate_vit": "1e-3", "learning_rate_projector": "1e-3",
        "max_steps": chosen.steps, "per_device_train_batch_size": chosen.batch, "mixed_precision": "no",
        "num_workers": 0, "save_steps": 1_000_000, "eval_steps": 1_000_000, "eval_on_start": "false",
        "eval_max_new_tokens": 6, "per_device_eval_batch_size": 20, "report": "false", "seed": seed,
    }  # fmt: skip
    line = [sys.executable, "-m", "vlft", *(str(w) for name, value in words.items() for w in (f"--{name}", value))]
    line += ["--eval_dataset_scripts", *(f"{name}:exact_match" for name in SETS)]
    line += ["--augmentation", arm] if arm != "none" else []
    paths = os.pathsep.join([str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")])
    fixed = {"OMP_NUM_THREADS": str(chosen.threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths,
             "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    began = time.monotonic()
    with (chosen.out / f"log-{arm}-{seed}.txt").open("w") as log:
        subprocess.run(line, check=True, env=os.environ | fixed, stdout=log, stderr=subprocess.STDOUT)
    lines = [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]
    last = [one for one in lines if one["kind"] == "eval"][-1]
    found = {name: last[f"eval/{name}/exact_match/exact_match"] for name in SETS}
    shutil.rmtree(output)
    facts = {name: getattr(chosen, name) for name in ("pictures", "words", "steps", "batch")} | {
        "asked": chosen.held_out
    }
    return {"arm": arm, "seed": seed, **found, "seconds": round(time.monotonic() - began), **facts}


def table(lines: list[dict[str, object]], arms: list[str]) -> str:
    """Markdown: accuracy of every seed, mean and standard deviation, and the margin over the first arm."""
    seeds = sorted({int(str(one["seed"])) for one in lines})
    rows = [["held-out pictures", "augmentation", *(f"seed {s}" for s in seeds), "mean", "spread", "margin"]]
    rows.append(["---"] * len(rows[0]))
    for name, title in SETS.items():
        base: list[float] = []
        for arm in arms:
            found = [float(str(one[name])) for s in seeds for one in lines if (one["arm"], one["seed"]) == (arm, s)]
            base = base or found
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            gaps = [b - a for a, b in zip(base, found, strict=False)]
            margin = "" if found is base else f"{statistics.mean(gaps):+.1%} ({min(gaps):+.1%} to {max(gaps):+.1%})"
            shares = [f"{share:.1%}" for share in found]
            rows.append([title, arm, *shares, f"{statistics.mean(found):.1%}", f"{spread:.1%}", margin])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    chosen = options()
    chosen.out.mkdir(parents=True, exist_ok=True)
    kept = chosen.out / "lines.jsonl"
    lines = [json.loads(text) for text in kept.read_text().splitlines()] if kept.exists() else []
    arms = chosen.arms.split(",")
    for seed in range(chosen.first, chosen.seeds + 1):
        for arm in arms:
            if any((one["arm"], one["seed"]) == (arm, seed) for one in lines):
                continue
            lines.append(run(arm, seed, chosen))
            print(json.dumps(lines[-1]), flush=True)
            with kept.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    print(table(lines, arms))


if __name__ == "__main__":
    main()
