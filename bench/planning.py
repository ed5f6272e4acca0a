"""`vlft plan` against what is measured: peak memory and time of a step, one JSON line for each shape of a batch.

    python bench/planning.py --rows 3B-lora,7B-qlora --shapes 1x1,8x1
    python bench/planning.py --size tiny --device cpu --records 24 --rows 3B-lora      # does it work?

Every row, a size and a strategy, is a process of its own with a time limit, in which the model is loaded once and then
trains with one shape after another (samples of a forward x forwards of a step): the real program up to its first step,
then real steps on data of that shape. What is predicted is of the very steps that are measured, from the options, the
config and the index, as `vlft plan` predicts. Lines go to stdout and to OUT/planning.jsonl.

Memory is that of the whole process on the GPU, as a plan counts it: what PyTorch's allocator took at most, and what
lies outside of it. (Without a GPU it is the process's resident memory, which no plan is about.)
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import train as bench
import workload
from train import Row

LIGHT = {"optim": "adamw_8bit", "mixed_precision": "bf16"}
"""Where masters and states in fp32 would not fit into 80 GB."""
ROWS = {
    f"{size}-{name}": Row(size, strategy, ours=LIGHT if size == "7B" and name in ("full", "partial") else {})
    for size in ("3B", "7B")
    for name, strategy in {
        "full": "full", "partial": "partial_llm_full_vit", "lora": "lora", "lora-vit": "lora_llm_full_vit",
        "qlora": "qlora",
    }.items()
}  # fmt: skip
SHAPES = "1x1,8x1,2x4"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rows", default=",".join(ROWS), help="which, in this order: " + ", ".join(ROWS))
    made.add_argument("--shapes", default=SHAPES, help="samples of a forward x forwards of a step")
    made.add_argument("--size", help="another size for every row: " + ", ".join(workload.SIZES))
    made.add_argument("--steps", type=int, default=3, help="steps that are measured")
    made.add_argument("--warm", type=int, default=2, help="steps before them")
    made.add_argument("--option", nargs="*", action="extend", default=[], help="options of vlft, key=value")
    made.add_argument("--workers", type=int, default=8)
    made.add_argument("--records", type=int, default=0, help="of the data set; 0: 256")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--limit", type=float, default=180, help="seconds of one row with all its shapes")
    made.add_argument("--root", type=Path, default=workload.default_root(), help="models and data, made once")
    made.add_argument("--out", type=Path, default=Path("runs/bench"))
    made.add_argument("--one", help=argparse.SUPPRESS)
    made.add_argument("--line", type=Path, help=argparse.SUPPRESS)
    return made


# ---------------------------------------------------------------------------------------------------------------------
# In the process of a row
# ---------------------------------------------------------------------------------------------------------------------


def run_row(name: str, row: Row, given: argparse.Namespace) -> None:
    """Train with every shape; a line each, as soon as it is there."""
    from vlft import train
    from vlft.parse import parse

    shapes = [tuple(map(int, shape.split("x"))) for shape in given.shapes.split(",")]
    registry = bench.data_of(row, given)
    shutil.rmtree(given.root / "vlft-out", ignore_errors=True)

    def words(shape: tuple[int, ...]) -> list[str]:
        batch = {"per_device_train_batch_size": str(shape[0]), "gradient_accumulation_steps": str(shape[1])}
        one = replace(row, ours=row.ours | batch)
        return [*bench.words_of(one, given, registry, given.warm + given.steps), "--skip_probe"]

    def fit(job: Any) -> None:
        job.packed.train()
        for shape in shapes:
            facts = {"row": name, "size": row.size, "strategy": row.strategy, "shape": f"{shape[0]}x{shape[1]}"}
            found = facts | measured(job, words(shape), given)
            with given.line.open("a") as out:
                out.write(json.dumps(found) + "\n")

    train.fit = fit  # type: ignore[assignment]
    train.hand_over = lambda _: None
    train.recovery.judge = lambda _: None  # type: ignore[attr-defined]
    train.main(parse(words(shapes[0])))


def measured(job: Any, words: list[str], given: argparse.Namespace) -> dict[str, Any]:
    """What a plan says of the first steps with these options, and what they take."""
    from vlft.commands import read_plan
    from vlft.data.budget import Budget
    from vlft.models.kernels.memory import said
    from vlft.planning import gpus
    from vlft.planning.advice import with_flags
    from vlft.planning.estimate import estimate, expected
    from vlft.planning.load import look

    gpu = gpus.here() or gpus.by_name("H100")
    run = read_plan(with_flags(words, {"output_dir": None})).run  # that folder is the run's own by now
    plan, total = estimate(run, gpu), given.warm + given.steps
    if plan.data.steps_per_epoch < total:
        raise SystemExit(f"{plan.data.steps_per_epoch} steps of {words}: more --records are needed.")
    shape, training = job.meter.counts
    kind = {"costs": job.costs, "budget": Budget(), "total": total}
    steps = look(plan.data, shape, start=given.warm, **kind)
    steps = replace(steps, largest=look(plan.data, shape, **kind).largest)  # the warm steps have their peaks too
    # `plan.gpu`, not `gpu`: it has no more memory than `--memory SIZE` says.
    memory, expects = expected(run.config, plan.static, shape, training, steps, plan.gpu, job.source.compute_dtype)
    seconds, peak, more = train_steps(job, run, given.warm, total)
    return {
        "gpu": gpu.name, "predicted_peak_gib": _gib(memory.peak), "measured_peak_gib": _gib(peak),
        "peak_error_percent": _percent(memory.peak, peak), "predicted_step_s": float(f"{expects.step:.4g}"),
        "measured_step_s": float(f"{seconds:.4g}"), "step_error_percent": _percent(expects.step, seconds),
        "tokens_of_largest_row": steps.largest.tokens, "patches_of_largest_row": steps.largest.patches,
        "predicted_memory": said(memory.keeps) or "all", **more,
    }  # fmt: skip


def train_steps(job: Any, run: Any, warm: int, total: int) -> tuple[float, float, dict[str, Any]]:
    """Seconds of a mean step behind the warm ones, peak in bytes, and what else there is.

    With what was waited for data: workers that are slower than the GPU make a step longer than any plan.
    """
    import torch

    from vlft import train
    from vlft.config import global_batch
    from vlft.data.budget import Budget
    from vlft.data.prepare import prepare_data
    from vlft.meter import peak_memory_gib
    from vlft.setup import data_options

    cuda, outside = job.engine.device.type == "cuda", 0.0

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    batch = global_batch(run.config, 1)
    job.data = prepare_data(data_options(run, job.engine, job.source.checkpoint, batch, job.data.options.policy))
    job.done_steps, job.total_steps, job.budget, job.trial = 0, total, Budget(), Budget()
    job.open_steps()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = 0.0
    for step in job.steps:
        if step.number == warm:
            began = now()
        train.train_step(job, step)
        job.done_steps += 1
    seconds = now() - began
    more = {"budget": str(job.budget), "memory": str(job.packed.memory)}
    if not cuda:
        return seconds / (total - warm), peak_memory_gib(job.engine.device) * 2**30, more
    free, whole = torch.cuda.mem_get_info()
    outside = whole - free - torch.cuda.memory_reserved()
    more |= {"outside_gib": _gib(outside), "allocated_peak_gib": _gib(torch.cuda.max_memory_allocated())}
    return seconds / (total - warm), torch.cuda.max_memory_reserved() + outside, more


def _gib(size: float) -> float:
    return round(size / 2**30, 3)


def _percent(predicted: float, found: float) -> float:
    """By which a prediction is too high."""
    return round(100 * (predicted / found - 1), 1)


# ---------------------------------------------------------------------------------------------------------------------
# In the process that asks for rows
# ---------------------------------------------------------------------------------------------------------------------


def command(name: str, given: argparse.Namespace, line: Path) -> list[str]:
    plain = {key: getattr(given, key) for key in ("shapes", "steps", "warm", "workers", "records", "device", "root")}
    words = [word for key, value in plain.items() for word in (f"--{key}", str(value))]
    words += ["--size", given.size] if given.size else []
    words += ["--option", *given.option] if given.option else []
    return [sys.executable, str(Path(__file__).resolve()), "--one", name, "--line", str(line), *words]


def lines_of(name: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Of one row: those shapes that were measured, and an error if it did not come to its end."""
    result, log = given.root / "lines.jsonl", given.root / "log.txt"
    result.unlink(missing_ok=True)
    began = time.monotonic()
    wrong = bench.run(command(name, given, result), given.limit, bench.environment(given, "vlft"), log)
    with (given.out / "log.txt").open("a") as whole:
        whole.write(f"==== planning {name}\n{log.read_text(errors='replace')[-200_000:]}\n")
    found = [json.loads(line) for line in result.read_text().splitlines()] if result.exists() else []
    if wrong:
        found.append({"row": name, "error": wrong, "wall_s": round(time.monotonic() - began, 1)})
    return found


def main() -> None:
    bench.end_with_children()
    given = parser().parse_args()
    if unknown := [name for name in given.rows.split(",") if name not in ROWS]:
        raise SystemExit(f"unknown rows: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if given.one:
        run_row(given.one, bench.resized(ROWS[given.one], given.size), given)
        return
    rows = [(name, bench.resized(ROWS[name], given.size)) for name in given.rows.split(",")]
    bench.prepare(rows, given)
    for name, _ in rows:
        for line in map(json.dumps, lines_of(name, given)):
            print(line, flush=True)
            with (given.out / "planning.jsonl").open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
