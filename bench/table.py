"""The table of docs/performance.md from the lines of bench/train.py.

    python bench/table.py runs/bench/lines.jsonl                 # to stdout
    python bench/table.py lines.jsonl --into docs/performance.md # between the marks there

Of several lines for one row and one program the last that has no error counts, or else the last.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

START, END = "<!-- bench -->", "<!-- /bench -->"
WORK = {
    "3B-full-bf16": ("3B `full`, all bf16", ">= 50% MFU, >= 3.4x", "<= 75 GiB"),
    "3B-full-fp32": ("3B `full`, fp32 masters", ">= 50% MFU", "<= 75 GiB"),
    "3B-lora": ("3B `lora_llm_full_vit`", ">= 45% MFU, >= 4x", "<= 40 GiB"),
    "3B-lora-bf16": ("the same, ViT and adapters in bf16", ">= 45% MFU, >= 4x", ""),
    "3B-lora-two": ("the same, in two forwards", "", "<= 40 GiB"),
    "7B-lora": ("7B `lora_llm_full_vit`", ">= 45% MFU", "<= 78 GiB"),
    "7B-lora-low": ("7B `lora_llm_full_vit --memory low`", "trains", "<= 24 GiB"),
    "7B-qlora": ("7B `qlora`", ">= 45% MFU, >= 3.5x", "<= 24 GiB"),
    "7B-qlora-two": ("the same, in two forwards", "", "<= 24 GiB"),
    "7B-qlora-low": ("7B `qlora --memory low`", "trains", "<= 10 GiB"),
    "7B-full": ("7B `full`", ">= 45% MFU", "<= 78 GiB"),
    "3B-short": ("3B `lora`, short samples", ">= 5x", ""),
}
"""Rows, with their goals."""
HEAD = (
    "work", "weights / gradients / states", "peer: samples/s, MFU, GiB", "vlft: samples/s, MFU, GiB", "times the peer",
    "first step, s", "goal", "and memory",
)  # fmt: skip
NO_ROOM = ("OutOfMemoryError", "DeviceMemoryError", "out of memory")
SHORT = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}


def read(paths: Iterable[Path]) -> dict[tuple[str, str], dict[str, Any]]:
    """(row, who) -> its line."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in paths:
        for text in path.read_text().splitlines():
            line = json.loads(text)
            key = (line.get("row", ""), line.get("who", ""))
            if "error" not in line or "error" in found.get(key, line):
                found[key] = line
    return found


def numbers(line: dict[str, Any] | None) -> str:
    if line is None:
        return "not measured yet"
    if "error" in line:
        return "does not fit" if any(word in line["error"] for word in NO_ROOM) else "failed"
    mfu = f"{line['mfu']:.1%}" if line.get("mfu") else "no MFU"
    return f"{line['samples_per_s']:.2f}, {mfu}, {line['peak_gib']:.1f}"


def dtypes(line: dict[str, Any] | None) -> str:
    if line is None or "weights" not in line:
        return ""
    parts = ("+".join(SHORT.get(d, d) for d in line[name].split("+")) for name in ("weights", "gradients", "states"))
    return " / ".join(parts)


def row(name: str, lines: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    ours, peer = lines.get((name, "vlft")), lines.get((name, "trl"))
    work, goal, memory = WORK[name]
    both = [dtypes(line) for line in (ours, peer) if dtypes(line)]
    kinds = both[0] if len(set(both)) == 1 else "; peer ".join(both)
    done = [line for line in (ours, peer) if line and "samples_per_s" in line]
    times = f"{done[0]['samples_per_s'] / done[1]['samples_per_s']:.1f}" if len(done) == 2 else ""
    first = f"{ours['first_step_s']:.0f}" if ours and "first_step_s" in ours else ""
    return [work, kinds, numbers(peer), numbers(ours), times, first, goal, memory]


def table(lines: dict[tuple[str, str], dict[str, Any]]) -> str:
    rows = [list(HEAD), ["---"] * len(HEAD), *(row(name, lines) for name in WORK)]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
    machines = sorted({f"{line['gpu']}, torch {line['torch']}" for line in lines.values() if "gpu" in line})
    return text + (f"\n\nMeasured on: {'; '.join(machines)}." if machines else "") + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, nargs="*")
    parser.add_argument("--into", type=Path, help="write it into this page, between the marks")
    given = parser.parse_args()
    made = table(read(given.lines))
    if given.into is None:
        print(made, end="")
        return
    before, _, rest = given.into.read_text().partition(START)
    _, _, after = rest.partition(END)
    given.into.write_text(f"{before}{START}\n{made}{END}{after}")


if __name__ == "__main__":
    main()
