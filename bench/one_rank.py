"""One rank of several, on one GPU: what a layout costs it besides the network. JSON lines at once.

    python bench/one_rank.py --layouts one,zero3,fsdp2 --steps 16 --warm 20
    python bench/one_rank.py --layouts zero3 --ranks 8 --wire 0 --profile            # the network takes no time
    python bench/one_rank.py --layouts zero3 --deepspeed other.json
    python bench/one_rank.py --size tiny --device cpu --records 16 --steps 2 --warm 1 --batch 2    # does it work?

Where no machine with several GPUs is at hand. The first rank is the real program, with its own share of weights and
samples; the others are echoes (echoes.py). So weights make no model of use, but as many kernels and as much memory as
one. Of the network there is only the time that --wire says: NCCL takes processors from the products beside it, and
ranks wait for the slowest. `of_one` is the FLOPs in a second over those of the layout `one`, this GPU by itself, which
holds 7B `full` with `adamw_8bit` and without fp32 masters: an upper bound of what bench/scaling.py measures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import train as bench

ASKED = "VLFT_BENCH_ONE_RANK"
"""Environment: what the process of the real rank is to do."""
LAYOUTS = ("one", "ddp", "zero2", "zero3", "fsdp2")


def parser() -> argparse.ArgumentParser:
    made = bench.parser()
    made.description = __doc__
    made.set_defaults(rows="full", size="7B")
    made.add_argument("--layouts", default="one,zero3", help="some of " + ", ".join(LAYOUTS))
    made.add_argument("--ranks", type=int, default=2, help="of which one is real")
    made.add_argument("--batch", type=int, default=8, help="samples of a rank in a step, in one forward")
    made.add_argument("--wire", type=float, default=300, help="10^9 bytes a second, to and from a rank; 0: no time")
    made.add_argument("--deepspeed", help="another file for zero2 or zero3")
    return made


def run(asked: dict[str, Any]) -> dict[str, Any]:
    """In the process of the real rank."""
    given, layout = argparse.Namespace(**asked["given"]), asked["layout"]
    given.root, given.out = Path(given.root), Path(given.out)
    name = "-".join([layout, *([Path(given.deepspeed).stem] if given.deepspeed else [])])
    given.profile_path = given.out / f"profile-{name}.txt" if given.profile else None
    ours = {"per_device_train_batch_size": str(given.batch), "gradient_accumulation_steps": "1"}
    if layout == "one":
        ours |= bench.LIGHT
    else:
        import echoes

        echoes.meet(given.ranks, given.wire)
    if layout.startswith("zero"):
        ours["deepspeed"] = given.deepspeed or layout
    line: dict[str, Any] = bench.run_vlft(bench.Row(given.size, asked["strategy"], ours=ours), given)
    return line


def environment(layout: str, given: argparse.Namespace) -> dict[str, str]:
    env: dict[str, str] = bench.environment(given, "vlft")
    if layout == "one":
        return env
    env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(given.ranks), "LOCAL_WORLD_SIZE": str(given.ranks)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}  # asked for, and not used
    return env | ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if layout == "fsdp2" else {})


def measure(layout: str, strategy: str, given: argparse.Namespace) -> dict[str, Any]:
    facts = {"layout": layout, "ranks": given.ranks if layout != "one" else 1, "size": given.size}
    facts |= {"strategy": strategy, "wire": given.wire, "deepspeed": given.deepspeed}
    result = given.root / "line.json"
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
    asked = {"given": options, "layout": layout, "strategy": strategy, "line": str(result)}
    env = environment(layout, given) | {ASKED: json.dumps(asked)}
    return facts | bench.line_of(layout, [sys.executable, str(Path(__file__).resolve())], env, result, given)


def main() -> None:
    bench.end_with_children()
    given = parser().parse_args()
    layouts = given.layouts.split(",")
    if unknown := {*layouts} - {*LAYOUTS}:
        raise SystemExit(f"unknown layouts: {', '.join(sorted(unknown))}; there are {', '.join(LAYOUTS)}")
    for strategy in given.rows.split(","):
        bench.prepare([(strategy, bench.Row(given.size, strategy))], given)
        one = None
        for layout in layouts:
            found = measure(layout, strategy, given)
            if "error" not in found:
                one = found["tflops"] if layout == "one" else one
                found |= {"of_one": round(found["tflops"] / one, 4)} if one else {}
            bench.say(found, given)


if __name__ == "__main__":
    if ASKED in os.environ:  # data workers that are spawned import this module under another name
        wanted = json.loads(os.environ.pop(ASKED))
        Path(wanted["line"]).write_text(json.dumps(run(wanted)))
    else:
        main()
