"""Contact sheets of docs/augmentation.md: a small set with boxes, points, two pictures and words, shown by the program.

python bench/augmentation_sheets.py       # writes docs/images/augmentation-*.jpg with `vlft augment-preview`
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from augmentation_study import word_picture
from PIL import Image, ImageDraw, ImageFont

from demo import draw

ROOT = Path(__file__).resolve().parents[1]


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def box_of(thing: draw.Thing) -> list[float]:
    """(x1, y1, x2, y2) in pixels of the drawn picture."""
    corners = thing.corners + np.array([thing.x, thing.y])
    return [float(n) for n in (*corners.min(axis=0), *corners.max(axis=0))]


def shapes(folder: Path) -> list[dict[str, object]]:
    """Boxes, a point, a count, a side, and two pictures of one conversation."""
    made = []
    for k in range(6):
        picture, things = draw.look_picture(3000 + k)
        picture.resize((336, 336), Image.Resampling.BICUBIC).save(folder / f"shape-{k}.png")
        made.append([[3 * n for n in box_of(thing)] for thing in things])
    boxes = [json.dumps([{"bbox_2d": [round(n) for n in box]} for box in found]) for found in made]
    point = [round((a + b) / 2) for a, b in zip(made[1][0][:2], made[1][0][2:], strict=True)]
    records: list[dict[str, object]] = [
        {"messages": turns("<image>Find the shapes.", boxes[0]), "images": ["shape-0.png"]},
        {"messages": turns("<image>Where?", json.dumps({"point_2d": point})), "images": ["shape-1.png"]},
        {"messages": turns("<image>How many shapes?", str(len(made[2]))), "images": ["shape-2.png"]},
        {"messages": turns("<image>Is it on the left?", "no"), "images": ["shape-3.png"]},
        {"messages": turns("<image><image>Which has more?", "the second"), "images": ["shape-4.png", "shape-5.png"]},
    ]
    return records


def pages(folder: Path) -> list[dict[str, object]]:
    """A page with a box around its total, and a word."""
    rng = random.Random(0)
    page = Image.new("RGB", (448, 560), "#fbfaf5")
    pen = ImageDraw.Draw(page)
    for n in range(16):
        text = " ".join(rng.choice("invoice item number price date order customer tax".split()) for _ in range(5))
        pen.text((36, 40 + 24 * n), text, fill="#222222", font=ImageFont.load_default(16))
    pen.text((250, 470), "total 1234.50", fill="#111111", font=ImageFont.load_default(22))
    page.save(folder / "page.png")
    word_picture(5)[0].resize((336, 336), Image.Resampling.BICUBIC).save(folder / "word.png")
    total = json.dumps({"bbox_2d": [246, 466, 400, 500]})
    return [
        {"messages": turns("<image>Where is the total written?", total), "images": ["page.png"]},
        {"messages": turns("<image>Read the word.", word_picture(5)[1]), "images": ["word.png"]},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images")
    chosen = parser.parse_args()
    paths = os.pathsep.join([str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for policy, records in (("geometric", shapes(folder)), ("document", pages(folder))):
            (folder / f"{policy}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            spec = {"json_path": f"{policy}.jsonl", "box_format": "pixels", "split": "train"}
            registry = folder / f"{policy}.json"
            registry.write_text(json.dumps({"datasets": {policy: spec}}))
            words = [sys.executable, "-m", "vlft", "augment-preview", str(ROOT / "demo/base")]
            words += ["--dataset_config_path", str(registry), "--augmentation", policy, "--epochs", "4"]
            words += ["--cache_dir", str(folder / "cache"), "--output", str(chosen.out / f"augmentation-{policy}.jpg")]
            subprocess.run(words, check=True, env=os.environ | {"PYTHONPATH": paths})


if __name__ == "__main__":
    main()
