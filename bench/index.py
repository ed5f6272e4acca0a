"""Seconds and memory of the index: 10 000 and 100 000 records, a million with --million.

    python bench/index.py [--million] [--workers 2] [--folder /tmp/vlft_bench]

Each size runs in a process of its own. Every record has its own picture file (hard links to 200 drawn ones), so that
each costs an open and a look at its header, as in a real set. Memory is of the main process: "own" cannot be given back
by the system (RssAnon), "peak" is the largest resident size, mapped pages of the index included. The curve that it gave
is in docs/data.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PICTURES = 200


def tiny() -> Any:
    from vlft.testing import tiny as module

    return module


def draw(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "drawn").mkdir(parents=True, exist_ok=True)
    for n in range(PICTURES):
        w, h = rng.integers(64, 1200, 2).tolist()
        small = rng.integers(0, 256, (h // 32 + 1, w // 32 + 1, 3), np.uint8)
        Image.fromarray(small).resize((w, h)).save(folder / "drawn" / f"{n}.jpg", quality=80)


def write(folder: Path, count: int) -> Path:
    """A JSON list of `count` records: one picture mostly, sometimes none or two, one or two turns."""
    rng = random.Random(0)
    words = tiny().WORDS
    pictures = folder / "pictures"
    path = folder / f"{count}.json"
    with path.open("w") as file:
        file.write("[\n")
        for n in range(count):
            k = rng.choices((0, 1, 2), (1, 8, 1))[0]
            names = []
            for j in range(k):
                name = f"{n // 1000}/{n}_{j}.jpg"
                names.append(name)
                target = pictures / name
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.link(folder / "drawn" / f"{(n + j) % PICTURES}.jpg", target)
            messages = []
            for turn in range(rng.choice((1, 1, 2))):
                marks = "<image>" * k if turn == 0 else ""
                messages.append({"role": "user", "content": marks + " ".join(rng.choices(words, k=20))})
                messages.append({"role": "assistant", "content": " ".join(rng.choices(words, k=30))})
            record = {"id": str(n), "messages": messages, "images": names}
            file.write(json.dumps(record) + (",\n" if n + 1 < count else "\n]\n"))
    return path


def memory() -> dict[str, int]:
    """Resident megabytes of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {key: int(fields[name].split()[0]) // 1024 for key, name in (("own", "RssAnon"), ("peak", "VmHWM"))}


def measure(folder: Path, path: Path, workers: int) -> dict[str, Any]:
    from vlft.data.index import open_index
    from vlft.data.plan import Plan
    from vlft.data.registry import DatasetSpec
    from vlft.data.sample import Limits, fit, split
    from vlft.data.tokens import Chat
    from vlft.family import FAMILIES

    chat = Chat.load(folder / "model", FAMILIES["qwen2_5_vl"])
    spec = DatasetSpec(name="bench", json_path=path, image_root=folder / "pictures")
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    before = memory()
    out: dict[str, Any] = {"file_mb": path.stat().st_size >> 20}

    def timed(name: str, work: Any) -> Any:
        began = time.perf_counter()
        result = work()
        out[name] = round(time.perf_counter() - began, 3)
        return result

    timed("build_s", lambda: open_index([spec], chat, cache_dir=cache, workers=workers, progress=True))
    out["build_peak_mb"] = memory()["peak"] - before["peak"]
    index = timed("open_s", lambda: open_index([spec], chat, cache_dir=cache, workers=workers))
    fitted = timed("fit_s", lambda: fit(index, Limits(3136, 1003520, 2048, "shrink", 28)))
    train, _ = timed("split_s", lambda: split(index, [spec], 0.9, usable=fitted.usable))
    plan = Plan(train, index.dataset[train], [1.0], seed=0, global_batch=64)
    timed("first_step_s", lambda: plan.members(0, 0))
    after = memory()
    out["own_mb"] = after["own"] - before["own"]
    out["peak_mb"] = after["peak"] - before["peak"]
    out["index_disk_mb"] = sum(f.stat().st_size for f in cache.rglob("*") if f.is_file()) >> 20
    out["usable"], out["ledger"] = len(index), len(index.ledger)
    return out


def curve(folder: Path, counts: Sequence[int], workers: int) -> Iterator[dict[str, Any]]:
    """What each number of records costs. `startup_s`: what a run over an index that is there waits for."""
    draw(folder)
    tiny().make_tokenizer().save_pretrained(folder / "model")
    for count in counts:
        write(folder, count)
        words = [sys.executable, __file__, "--one", str(count), "--folder", str(folder), "--workers", str(workers)]
        result = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(result.stdout)
        waited = sum(found[name] for name in ("open_s", "fit_s", "split_s", "first_step_s"))
        yield {"records": count, "workers": workers, **found, "startup_s": round(waited, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--million", action="store_true", help="a million records too (about 2 GB of disk)")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/vlft_bench"), help="scratch folder")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder: Path = given.folder
    if given.one is not None:
        print(json.dumps(measure(folder, folder / f"{given.one}.json", given.workers)))
        return
    counts = [10_000, 100_000, *([1_000_000] if given.million else [])]
    for line in curve(folder, counts, given.workers):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
