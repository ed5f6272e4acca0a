"""The demo, `make demo`: a tiny model learns to see what it could not see, with the commands that train a big one.

Draws a visual question answering set, asks the base model, fine-tunes it with `vlft` (qlora, vision tower trained),
merges the result and asks again. Everything lands in `runs/demo`; `run/predictions.png` there shows both answers.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Threads that spin while they wait for each other make a step 50 times as slow where something else uses a core. It is
# read when torch is loaded, by the commands below too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from PIL import Image

from demo import draw
from demo.ask import Asked, exact_match

BASE = Path(__file__).parent / "base"
GREEN, RED = "#1a7f37", "#cf222e"
MOST_BEFORE, LEAST_AFTER = 0.35, 0.90


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="where everything goes (emptied first)")
    parser.add_argument("--pictures", type=int, default=5500, help="training pictures")
    parser.add_argument("--held_out", type=int, default=240, help="held-out pictures")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing and of the training")
    return parser.parse_args()


def say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def command(name: str, *words: object) -> None:
    """Show a command, then run it; `name` is a program that the environment of this Python has."""
    line = [name, *(str(word) for word in words)]
    print("$", shlex.join(line), flush=True)
    if code := subprocess.run([str(Path(sys.executable).parent / name), *line[1:]], check=False).returncode:
        raise SystemExit(code)  # it has said why


def held_out(data: Path) -> list[Asked]:
    """The held-out questions, read from the same files that vlft reads."""
    asked = []
    for line in (data / "held_out.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        (image, question), answer = record["messages"][0]["content"], record["messages"][1]["content"]
        picture = Image.open(data / "pictures" / image["image"]).convert("RGB")
        asked.append(Asked(picture, record["kind"], question["text"], answer))
    return asked


def fine_tune(run: Path, registry: Path, seed: int) -> None:
    threads = os.cpu_count() or 1
    command(
        "accelerate", "launch", "--cpu", "--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no",
        "--dynamo_backend", "no", "--num_cpu_threads_per_process", threads, "-m", "vlft",
        "--model_name_or_path", os.path.relpath(BASE), "--output_dir", run,
        "--dataset_config_path", registry,
        "--tuning_strategy", "qlora", "--train_vit", "--lora_rank", 32, "--lora_alpha", 64, "--lora_dropout", 0,
        "--learning_rate_llm", "2e-3", "--learning_rate_vit", "1e-3", "--learning_rate_projector", "1e-3",
        "--epochs", 3, "--per_device_train_batch_size", 32, "--mixed_precision", "no", "--num_workers", 0,
        "--save_steps", 10_000, "--eval_steps", 10_000, "--seed", seed,
    )  # fmt: skip


def report(questions: list[Asked], before: list[str], after: list[str]) -> tuple[float, float]:
    """Print the exact match by kind of question; returns the totals."""
    print(f"{'held-out pictures':24}{'before':>8}{'after':>10}")
    for kind in (*draw.KINDS, "all"):
        rows = [k for k, asked in enumerate(questions) if kind in (asked.kind, "all")]
        shares = [sum(answers[k] == questions[k].answer for k in rows) / len(rows) for answers in (before, after)]
        print(f"  {kind:12}{len(rows):10}{shares[0]:8.1%} -> {shares[1]:6.1%}")
    return shares[0], shares[1]


def show(questions: list[Asked], before: list[str], after: list[str], path: Path) -> None:
    """A grid of held-out pictures with both answers: the first, not the best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = 4
    rows = 4
    figure, axes = plt.subplots(rows, columns, figsize=(11, 13.2))
    for k, axis in enumerate(axes.flat):
        _panel(axis, questions[k], before[k], after[k])
        axis.set_axis_off()
    figure.suptitle("Held-out pictures: the answers before and after fine-tuning", fontsize=14, weight="bold")
    figure.tight_layout(rect=(0, 0, 1, 0.985), h_pad=1.6)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, asked: Asked, before: str, after: str) -> None:
    axis.imshow(asked.picture, interpolation="bicubic")
    axis.set_title(asked.question, fontsize=10.5)
    for x, when, answer in ((0.0, "before", before), (0.56, "after", after)):
        right = answer == asked.answer
        axis.text(
            x, -0.03, f"{when}: {answer or '(nothing)'} {'✓' if right else '✗'}", transform=axis.transAxes,
            va="top", fontsize=9.5, color=GREEN if right else RED, weight="bold",
        )  # fmt: skip


def main() -> int:
    chosen, begun = options(), time.perf_counter()
    data, run, merged = (chosen.folder / name for name in ("data", "run", "merged"))
    shutil.rmtree(chosen.folder, ignore_errors=True)

    say(f"1. Drawing {chosen.pictures} pictures to learn from and {chosen.held_out} held-out ones")
    registry = draw.write_demo(data, chosen.pictures, chosen.held_out, chosen.seed)
    questions = held_out(data)

    say("2. Asking the base model: new colours and counting are strange to it")
    first, before = exact_match(BASE, questions)
    print(f"exact match {first:.1%}")

    say("3. Fine-tuning: the language model in 4 bits with adapters, the vision tower in full precision")
    fine_tune(run, registry, chosen.seed)

    say("4. Merging the adapters into a plain Hugging Face folder")
    command("vlft", "merge", run / "model", "--output_dir", merged)

    say("5. Asking the fine-tuned model about the same held-out pictures")
    _, after = exact_match(merged, questions)
    first, last = report(questions, before, after)
    show(questions, before, after, run / "predictions.png")
    print(f"\npredictions: {run / 'predictions.png'}\nmodel:       {merged}")
    fine = first < MOST_BEFORE and last >= LEAST_AFTER
    verdict = "Done" if fine else "NOT as promised"
    say(f"{verdict}: {first:.1%} -> {last:.1%} in {time.perf_counter() - begun:.0f} seconds")
    if not fine:
        print(f"(promised: below {MOST_BEFORE:.0%} before, at least {LEAST_AFTER:.0%} after)", file=sys.stderr)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
