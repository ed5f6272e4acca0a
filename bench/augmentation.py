"""What augmentation costs: its share of whole optimizer steps, for each policy. One JSON line a policy, then a table.

    python bench/augmentation.py        # 3B LoRA + ViT on a GPU, as in bench/train.py
    python bench/augmentation.py --size tiny --device cpu --records 16 --steps 2 --warm 1        # does it work?

Each policy trains in a process of its own: the real program (bench/train.py), on the same samples in the same order.
Rules are switched off, since the bench's texts speak of reading and would keep every picture where it is.

against  seconds of a step over those of `none`, less one: what a run costs, with the noise of two runs
share    of ALONE more steps: seconds in `augment_row` over those of the steps, the device waited for before and after.
         Nothing overlaps, so that it is an upper bound
worker   milliseconds in which a worker process draws a movement and rewrites a sample's text; it hides behind the step
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import train
import workload
import yaml

POLICIES = ("none", "photometric", "geometric", "document")
ROW = "3B-lora"
ALONE = 6
"""Steps in which nothing overlaps, after those that are timed as a run makes them."""


def parser() -> argparse.ArgumentParser:
    made = train.parser()
    made.description = __doc__
    made.set_defaults(rows=ROW, out=Path("runs/bench-augmentation"))
    made.add_argument("--policies", default=",".join(POLICIES), help="in this order; none first, to compare with")
    return made


# ---------------------------------------------------------------------------------------------------------------------
# In the process of a policy
# ---------------------------------------------------------------------------------------------------------------------


def without_rules(name: str, folder: Path) -> Path:
    """The policy as a file in which no word forbids anything."""
    from vlft.augmentation import policy
    from vlft.augmentation.rules import default_rules

    raw: dict[str, Any] = yaml.safe_load((Path(policy.__file__).parent / "policies" / f"{name}.yaml").read_text())
    raw["rules"] = dict.fromkeys(default_rules())
    path = folder / f"{name}-without-rules.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def one(name: str, given: argparse.Namespace) -> dict[str, Any]:
    import torch

    from vlft import batch
    from vlft import train as story

    spent: list[float] = []
    steps: list[tuple[float, float, int]] = []
    real, real_step, real_ahead = batch.augment_row, story.train_step, batch.Feed.look_ahead

    def alone() -> bool:
        return len(steps) >= given.warm + given.steps

    def wait() -> None:
        if alone() and given.device == "cuda":
            torch.cuda.synchronize()

    def timed(pictures: Any, *rest: Any) -> Any:
        wait()
        began = time.perf_counter()
        shown = real(pictures, *rest)
        wait()
        spent.append(time.perf_counter() - began)
        return shown

    def step_timed(job: Any, step: Any) -> Any:
        wait()
        spent.clear()
        began = time.perf_counter()
        line = real_step(job, step)
        wait()
        steps.append((time.perf_counter() - began, sum(spent), sum(len(r.image_grid_thw) for r in step.rows)))
        return line

    batch.augment_row, story.train_step = timed, step_timed
    # Alone, every row is made ready in its own step.
    batch.Feed.look_ahead = lambda feed: None if alone() else real_ahead(feed)  # type: ignore[method-assign]
    row = train.resized(train.ROWS[ROW], given.size)
    if name != "none":
        row = replace(row, ours={**row.ours, "augmentation": str(without_rules(name, given.root))})
    given.profile_path = None
    line = train.run_vlft(row, given, more=ALONE + 1)
    kept = steps[-ALONE:]  # the one before them was looked ahead for
    whole, augmented, pictures = (sum(column) for column in zip(*kept, strict=True))
    return {
        "policy": name, "step_s": line["s_per_step_mean"], "steps": given.steps,
        "alone_step_s": whole / ALONE, "augment_s": augmented / ALONE, "share": augmented / whole,
        "ms_per_picture": 1000 * augmented / max(1, pictures), "pictures": pictures,
        "worker_ms": worker_ms(name, given), "device": line.get("gpu", given.device),
    }  # fmt: skip


def worker_ms(name: str, given: argparse.Namespace) -> float:
    """Milliseconds a sample that moving costs a worker, over twenty draws."""
    if name in ("none", "photometric"):
        return 0.0
    from vlft.augmentation.geometry import draw
    from vlft.augmentation.policy import read_policy

    policy = read_policy(str(without_rules(name, given.root)))
    draw(policy, 0, (1036, 812))
    began = time.perf_counter()
    for seed in range(20):
        draw(policy, seed, (1036, 812))
    return 1000 * (time.perf_counter() - began) / 20


# ---------------------------------------------------------------------------------------------------------------------
# In the process that asks
# ---------------------------------------------------------------------------------------------------------------------


def measure(name: str, given: argparse.Namespace) -> dict[str, Any]:
    result, log = given.root / "line.json", given.root / "log.txt"
    result.unlink(missing_ok=True)
    shared = {"steps": given.steps, "warm": given.warm, "root": given.root, "device": given.device, "out": given.out,
              "workers": given.workers, "line": result, "records": given.records}  # fmt: skip
    words = [sys.executable, str(Path(__file__).resolve()), "--one", name]
    words += [word for key, value in shared.items() for word in (f"--{key}", str(value))]
    words += ["--size", given.size] if given.size else []
    words += ["--option", *given.option] if given.option else []
    wrong = train.run(words, given.limit, train.environment(given, "vlft"), log)
    if wrong or not result.exists():
        return {"policy": name, "error": wrong or "no line"}
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown of the lines that are no errors."""
    rows = ["| policy | step, s | against none | alone, s | share | ms a picture | worker, ms a sample |"]
    rows.append("| --- | --- | --- | --- | --- | --- | --- |")
    base = next((one["step_s"] for one in lines if one["policy"] == "none" and "error" not in one), None)
    for line in lines:
        if "error" in line:
            continue
        against = f"{line['step_s'] / base - 1:+.1%}" if base and line["policy"] != "none" else ""
        rows.append(
            f"| `{line['policy']}` | {line['step_s']:.4f} | {against} | {line['augment_s']:.4f} | {line['share']:.2%} "
            f"| {line['ms_per_picture']:.2f} | {line['worker_ms']:.1f} |"
        )
    return "\n".join(rows)


def main() -> None:
    given = parser().parse_args()
    given.root.mkdir(parents=True, exist_ok=True)
    if given.one:
        given.line.write_text(json.dumps(one(given.one, given)))
        return
    train.prepare([(ROW, train.resized(train.ROWS[ROW], given.size))], given)
    lines = []
    for name in given.policies.split(","):
        lines.append(measure(name, given))
        print(json.dumps(lines[-1]), flush=True)
        with (given.out / "lines.jsonl").open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
    print(table(lines))


if __name__ == "__main__":
    assert workload.ROOT.is_dir()
    main()
