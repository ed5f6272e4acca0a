"""The same run under every layout against one process: `make matrix` runs all and writes docs/distributed.md's table.

A cell is the distance of the final weights (norm of the difference over the norm, of the whole vector of trained
weights) after six steps from those of one process, fp32, dropout 0, same seed and global batch. FSDP2 here is vlft's
engine without Accelerate's plugin, which is for GPUs (there it is tests/gpu).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs import FSDP_ON_CPU, command, distance, final_weights, metrics, start, write_data

STRATEGIES = ("full", "lora_llm_full_vit", "partial_llm_full_vit", "qlora")
LAYOUTS = ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2")
KINDS = {"DDP": "MULTI_CPU", "ZeRO-2": "DEEPSPEED", "ZeRO-3": "DEEPSPEED", "FSDP2": "MULTI_CPU"}
"""What run_card.json must say: a test easily only seems to be distributed."""
LIMIT = 1e-5
PAGE = Path(__file__).resolve().parents[1] / "docs" / "distributed.md"


@dataclass(frozen=True)
class Case:
    """How a global batch lies on processes."""

    processes: int
    micro_batch: int
    accumulation: int
    mixed: bool = False
    """Text alone on one rank, five pictures on another, and an epoch's last step with one sample for three ranks."""

    @property
    def title(self) -> str:
        batch = f"{self.processes} processes, accumulation {self.accumulation}"
        return f"{batch}, mixed batches" if self.mixed else batch


CASES = (Case(2, 4, 1), Case(2, 1, 4), Case(3, 1, 1, mixed=True))


def data(folder: Path, case: Case) -> Path:
    """A registry; 7 samples of 0 to 5 pictures for mixed batches, otherwise 21 of 0 to 3."""
    if case.mixed:
        return write_data(folder / "mixed", 7, counts=(0, 5, 0, 1, 0, 0, 2))
    return write_data(folder / "plain", 21)


def words(model: Path, registry: Path, out: Path, strategy: str, **more: Any) -> list[str]:
    # A rate of 1e-3 would show Adam's answer to round-off: k_proj's bias has no gradient but noise, and Adam takes a
    # full step on its sign.
    # Decay so large that a layout which forgets it ends 6e-4 from one that does not.
    options = {"max_steps": 6, "learning_rate_llm": 1e-4, "mixed_precision": "no", "weight_decay": 1.0}
    options |= {"lora_dropout": 0.0} if "lora" in strategy else {}
    return command(model, registry, out, strategy, **(options | more))


def reference(model: Path, folder: Path, strategy: str, case: Case) -> Path:
    """The same global batch in one process."""
    batch = case.processes * case.micro_batch * case.accumulation
    out = folder / f"one-{strategy}-{batch}-{case.mixed}"
    if not out.exists():
        start(words(model, data(folder, case), out, strategy, per_device_train_batch_size=batch))
    return out


def run_cell(model: Path, folder: Path, strategy: str, layout: str, case: Case) -> float:
    """Distance of one cell.

    Raises:
        AssertionError: the run was not what it should be, or its loss curve is another.
    """
    one = reference(model, folder, strategy, case)
    out = folder / f"{layout}-{strategy}-{case.title}"
    cut = {"per_device_train_batch_size": case.micro_batch, "gradient_accumulation_steps": case.accumulation}
    how = FSDP_ON_CPU if layout == "FSDP2" else {}
    zero = {"ZeRO-2": "zero2", "ZeRO-3": "zero3"}.get(layout)
    line = words(model, data(folder, case), out, strategy, deepspeed=zero, **cut)
    start(line, processes=case.processes, limit=200, **how)
    card = json.loads((out / "run_card.json").read_text())
    assert (card["world_size"], card["distributed_type"]) == (case.processes, KINDS[layout])
    for a, b in zip(metrics(one), metrics(out), strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-5 * abs(a["loss"])
        assert (a["samples"], a["supervised_tokens"]) == (b["samples"], b["supervised_tokens"])
    return distance(final_weights(one), final_weights(out))


def table(cells: dict[tuple[str, str, Case], str]) -> str:
    lines = ["| | " + " | ".join(LAYOUTS) + " |", "|---|" + "---|" * len(LAYOUTS)]
    for case in CASES:
        for strategy in STRATEGIES:
            row = [cells.get((strategy, layout, case), "") for layout in LAYOUTS]
            if any(row):
                lines.append(f"| `{strategy}`, {case.title} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run everything, write the table; the exit code counts the cells beyond the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
    chosen = parser.parse_args(arguments)
    from vlft.testing.tiny import make_checkpoint

    folder = Path(tempfile.mkdtemp(prefix="vlft-matrix-"))
    model = make_checkpoint("qwen2_5_vl", folder / "model")
    cells: dict[tuple[str, str, Case], str] = {}
    bad = 0
    began = time.monotonic()
    for case in CASES:
        for strategy in chosen.strategies:
            for layout in LAYOUTS:
                try:
                    gap = run_cell(model, folder, strategy, layout, case)
                    bad += gap > LIMIT
                    cells[strategy, layout, case] = f"{gap:.1e}"
                except AssertionError as error:
                    bad += 1
                    cells[strategy, layout, case] = "failed"
                    print(f"{error}"[:2000], file=sys.stderr)
                print(f"{strategy}, {layout}, {case.title}: {cells[strategy, layout, case]}", flush=True)
    text = table(cells)
    print(f"{text}\n{time.monotonic() - began:.0f} s, {bad} beyond {LIMIT:g}")
    page = PAGE.read_text(encoding="utf-8")
    place = re.compile(r"(<!-- matrix -->\n).*?(<!-- /matrix -->)", flags=re.DOTALL)
    PAGE.write_text(place.sub(lambda m: f"{m[1]}{text}\n{m[2]}", page), encoding="utf-8")
    return bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
