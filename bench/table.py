"""The table of docs/performance.md from the lines of bench/train.py; docs/distributed.md's from bench/scaling.py's.

    python bench/table.py runs/bench/lines.jsonl                               # to stdout
    python bench/table.py lines.jsonl --into docs/performance.md               # between the marks there
    python bench/table.py --scaling scaling.jsonl --into docs/distributed.md   # likewise

Of several lines for one row and one program the last that has no error counts, or else the last.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WORK = {
    "3B-full-bf16": ("3B `full`, all bf16", ">= 50% MFU, >= 3.4x", "<= 75 GiB"),
    "3B-full-fp32": ("3B `full`, fp32 masters", ">= 50% MFU", "<= 75 GiB"),
    "3B-lora": ("3B `lora_llm_full_vit`", ">= 45% MFU, >= 4x", "<= 40 GiB"),
    "3B-lora-bf16": ("the same, ViT and adapters in bf16", ">= 45% MFU, >= 4x", ""),
    "3B-lora-40": ("the same, `--memory 42.7GiB`", ">= 45% MFU, >= 4x", "<= 40 GiB"),
    "7B-lora": ("7B `lora_llm_full_vit`", ">= 45% MFU", "<= 78 GiB"),
    "7B-lora-low": ("7B `lora_llm_full_vit --memory low`", "trains", "<= 24 GiB"),
    "7B-qlora": ("7B `qlora`", ">= 45% MFU, >= 3.5x", "<= 24 GiB"),
    "7B-qlora-24": ("the same in two rows, `--memory 25GiB`", ">= 45% MFU, >= 3.5x", "<= 24 GiB"),
    "7B-qlora-low": ("7B `qlora --memory low`", "trains", "<= 10 GiB"),
    "7B-full": ("7B `full`", ">= 45% MFU", "<= 78 GiB"),
    "3B-short": ("3B `lora`, short samples", ">= 5x", ""),
}
"""Rows, with their goals."""
SAME_WORK = {
    "3B-lora-bf16": "3B-lora", "3B-lora-40": "3B-lora", "7B-lora-low": "7B-lora",
    "7B-qlora-24": "7B-qlora", "7B-qlora-low": "7B-qlora",
}  # fmt: skip
"""Rows for which the peer has nothing else to offer than for another."""
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
    ours = lines.get((name, "vlft"))
    peer = lines.get((name, "trl")) or lines.get((SAME_WORK.get(name, name), "trl"))
    work, goal, memory = WORK[name]
    own, theirs = dtypes(ours), dtypes(peer)
    kinds = "; ".join(said for said in (own, f"peer {theirs}" if theirs not in ("", own) else "") if said)
    done = [line for line in (ours, peer) if line and "samples_per_s" in line]
    times = f"{done[0]['samples_per_s'] / done[1]['samples_per_s']:.1f}" if len(done) == 2 else ""
    first = f"{ours['first_step_s']:.0f}" if ours and "first_step_s" in ours else ""
    return [work, kinds, numbers(peer), numbers(ours), times, first, goal, memory]


def table(lines: dict[tuple[str, str], dict[str, Any]]) -> str:
    text = _markdown(HEAD, [row(name, lines) for name in WORK])
    machines = sorted({f"{line['gpu']}, torch {line['torch']}" for line in lines.values() if "gpu" in line})
    return text + (f"\n\nMeasured on: {'; '.join(machines)}." if machines else "") + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Several GPUs
# ---------------------------------------------------------------------------------------------------------------------

Parts = dict[tuple[str, int, str, int], dict[str, Any]]
"""(row, GPUs, part, GPUs of a resume or else 0) -> its line."""
SPEED_HEAD = (
    "row", "GPUs", "samples/s", "one GPU", "efficiency", "goal", "MFU a GPU", "GiB", "slowest rank / mean",
)  # fmt: skip
SAME = 0.002
"""By so much may a sample of several GPUs cost more than one of one GPU's, and samples alone tell the efficiency."""
COURSE_HEAD = ("row", "GPUs", "losses against", "to the checkpoint", "killed", "others ended after", "resumed")


def read_scaling(paths: Iterable[Path]) -> Parts:
    found: Parts = {}
    for path in paths:
        for text in path.read_text().splitlines():
            line = json.loads(text)
            key = (line["row"], line["world"], line["part"], line["gpus"] if line["part"] == "resume" else 0)
            if "error" not in line or "error" in found.get(key, line):
                found[key] = line
    return found


def speed_row(line: dict[str, Any]) -> list[str]:
    def given(name: str, form: str) -> str:
        return format(line[name], form) if line.get(name) is not None else ""

    other, work = line.get("reference", "the same optimizer"), line.get("work", 1.0)
    # Unless both were timed over the same samples: what they had to compute was not the same.
    of_work = f", {line['efficiency'] * work:.1%} of the work" if abs(work - 1) > SAME else ""
    one = given("one_gpu", ".2f") + ("" if other == "the same optimizer" else f", {other}")
    return [
        f"{line['row']}, {line['batch']} a GPU", str(line["world"]), given("samples_per_s", ".2f"), one,
        given("efficiency", ".1%") + of_work, f">= {line['goal']:.0%}" if line.get("goal") else "", given("mfu", ".1%"),
        given("peak_gib", ".1f"), given("balance", ".3f"),
    ]  # fmt: skip


def course_row(name: str, world: int, lines: Parts) -> list[str]:
    def gaps(line: dict[str, Any]) -> str:
        if "error" in line:
            return "failed"
        if not line["steps"]:
            return "went on"
        same = "" if line["same_samples"] else ", OTHER SAMPLES"
        return f"{line['steps']} steps: {line['largest_difference']:.1e}, {line['mean_difference']:.1e}{same}"

    train, kill = lines[name, world, "train", 0], lines.get((name, world, "kill", 0), {})
    ended = "failed" if "error" in kill else f"{kill['others_ended_s']:.0f} s" if "others_ended_s" in kill else ""
    what = {"all": "all processes", "rank": "one rank"}.get(kill.get("killed", ""), "")
    resumes = sorted((key[-1] for key in lines if key[:3] == (name, world, "resume")), reverse=True)
    gone_on = [f"on {gpus}: {gaps(lines[name, world, 'resume', gpus])}" for gpus in resumes]
    return [name, str(world), train.get("against", ""), gaps(train), what, ended, "; ".join(gone_on)]


def scaling_table(lines: Parts) -> str:
    rows = list(dict.fromkeys(key[:2] for key in lines))
    speeds = [speed_row(lines[*row, "speed", 0]) for row in rows if (*row, "speed", 0) in lines]
    courses = [course_row(*row, lines) for row in rows if (*row, "train", 0) in lines]
    text = "\n\n".join(_markdown(*both) for both in ((SPEED_HEAD, speeds), (COURSE_HEAD, courses)) if both[1])
    done = [line for line in lines.values() if "date" in line]
    machines = sorted({f"{line['gpu']}, torch {line['torch']}, {line['date']}" for line in done if "gpu" in line})
    failed = [f"{row} ({part})" for (row, _, part, _), line in lines.items() if "error" in line]
    notes = [f"Measured on: {'; '.join(machines)}."] if machines else []
    notes += [f"Failed: {', '.join(failed)}."] if failed else []
    return "\n\n".join([text, *notes]) + "\n"


def _markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    cells = [list(head), ["---"] * len(list(head)), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, nargs="*")
    parser.add_argument("--scaling", action="store_true", help="they are those of bench/scaling.py")
    parser.add_argument("--into", type=Path, help="write it into this page, between the marks")
    given = parser.parse_args()
    mark = "scaling" if given.scaling else "bench"
    made = scaling_table(read_scaling(given.lines)) if given.scaling else table(read(given.lines))
    if given.into is None:
        print(made, end="")
        return
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, _, rest = given.into.read_text().partition(start)
    _, _, after = rest.partition(end)
    given.into.write_text(f"{before}{start}\n{made}{end}{after}")


if __name__ == "__main__":
    main()
