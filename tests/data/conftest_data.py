"""Helpers that tests import by name; conftest.py puts this folder on the path (pytest's importlib mode does not)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlft.data.registry import DatasetSpec


def picture(seed: int, width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def spec(path: Path, **options: Any) -> DatasetSpec:
    return DatasetSpec(**{"name": path.stem, "json_path": path, **options})


def text_record(n: int) -> dict[str, Any]:
    return {
        "id": f"t{n}",
        "messages": [{"role": "user", "content": f"what is {n}"}, {"role": "assistant", "content": "red"}],
    }


def image_record(n: int, *names: str, answer: str = "a red circle") -> dict[str, Any]:
    marks = "<image>" * len(names)
    return {
        "id": f"r{n}",
        "messages": [{"role": "user", "content": f"{marks}describe {n}"}, {"role": "assistant", "content": answer}],
        "images": list(names),
    }


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path
