"""Samples a second of the data path on one core, against Hugging Face's processor; start-up time against records.

    python bench/data.py [--data documents] [--records 64] [--rounds 3] [--workers 4] [--startup 1000 10000]

Both make the same samples from the same JPEG files: the same tokens and the same patches, which is checked. They take
turns, so that a busy machine slows both. Ours ends where the worker's work ends, with pixels of one byte; what the GPU
does with them afterwards (normalise, cut into patches) is timed too, on this CPU. --workers times the real loader.
One JSON line each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import workload

DATA = {"documents": (workload.documents, (4, 2)), "short": (workload.short, (64, 1))}
"""Sets of bench/train.py; samples of a forward, and forwards of a step."""


def job_of(root: Path, registry: Path, batch: tuple[int, int], workers: int) -> tuple[Any, Any, Path]:
    """The real data side of a run over a set, its pictures' facts, and the model folder."""
    from vlft.data.prepare import prepare_data
    from vlft.engine import start_engine
    from vlft.models.load import open_checkpoint
    from vlft.parse import parse
    from vlft.setup import data_options

    folder = workload.make_model("tiny", root / "model-tiny")
    words = ["--model_name_or_path", str(folder), "--output_dir", str(root / "none"), "--tuning_strategy", "full"]
    words += ["--dataset_config_path", str(registry), "--cache_dir", str(root / "cache")]
    words += ["--train_split_ratio", "1", "--num_workers", str(workers), "--per_device_train_batch_size", str(batch[0])]
    words += ["--gradient_accumulation_steps", str(batch[1])]
    checkpoint = open_checkpoint(str(folder))
    data = prepare_data(data_options(parse(words), start_engine("no"), checkpoint, batch[0] * batch[1]))
    return data, checkpoint.pictures, folder


class Ours:
    """A sample as a worker of the loader makes it; `inputs` is what the device does then."""

    def __init__(self, data: Any, pictures: Any) -> None:
        import torch

        from vlft.batch import ToInputs

        self.data, self.to_inputs = data, ToInputs(pictures, None, torch.device("cpu"))

    def __call__(self, i: int) -> Any:
        from vlft.data.collate import collate
        from vlft.data.loader import decode_sample
        from vlft.data.sample import build_sample

        d = self.data
        sample = build_sample(d.index, d.fitted, d.chat, i)
        tokens = dict(image_token_id=d.chat.image_token_id, pad_token_id=d.chat.pad_token_id)
        return collate([sample], [decode_sample(sample)], **tokens, merge=d.fitted.limits.merge)

    def inputs(self, i: int) -> Any:
        return self.to_inputs(self(i), False)


class Theirs:
    """A sample by the processor's own `__call__` on the rendered conversation, as collators of trainers call it."""

    def __init__(self, folder: Path, registry: Path) -> None:
        self.processor = workload.processor(folder)
        self.root = registry.parent
        lines = (registry.parent / "records.jsonl").read_text().splitlines()
        self.records = {record["id"]: record for record in map(json.loads, lines)}

    def __call__(self, identity: str) -> Any:
        from PIL import Image

        record = self.records[identity]
        pictures = [Image.open(self.root / path) for path in record["images"]]
        (user, answer) = record["messages"]
        text = user["content"].replace("<image>", "")
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}, answer]
        rendered = self.processor.apply_chat_template(turns, tokenize=False)
        return self.processor(text=[rendered], images=pictures, return_tensors="pt")


def same(ours: Any, theirs: Any) -> tuple[bool, float]:
    """Whether tokens are equal, and the largest difference of a patch's value (0 over Pillow's processor)."""
    ids = ours["input_ids_T"].equal(theirs["input_ids"])
    return ids, float((ours["pixel_values"] - theirs["pixel_values"].view_as(ours["pixel_values"])).abs().max())


def seconds(make: Callable[[Any], Any], items: list[Any]) -> float:
    began = time.perf_counter()
    for item in items:
        make(item)
    return time.perf_counter() - began


def one_core(data: Any, pictures: Any, folder: Path, registry: Path, rounds: int) -> dict[str, Any]:
    """Ratios of samples a second, all on one thread."""
    import torch

    torch.set_num_threads(1)
    ours, theirs = Ours(data, pictures), Theirs(folder, registry)
    ids = data.plan.ids.tolist()
    names = [data.index.sample_id(i) for i in ids]
    checked = [same(ours.inputs(i), theirs(name)) for i, name in zip(ids[:8], names[:8], strict=True)]
    taken: dict[str, list[float]] = {"ours": [], "ours_with_patches": [], "theirs": []}
    for _ in range(rounds):
        taken["ours"].append(seconds(ours, ids))
        taken["theirs"].append(seconds(theirs, names))
        taken["ours_with_patches"].append(seconds(ours.inputs, ids))
    rates = {name: len(ids) / statistics.median(times) for name, times in taken.items()}
    kind = type(theirs.processor.image_processor).__name__
    row, made = ours(ids[0]), theirs(names[0])
    return {
        "bench": "data_one_core", "records": len(ids), "processor": kind,
        "same_tokens": all(ok for ok, _ in checked), "largest_difference": max(gap for _, gap in checked),
        **{f"{name}_samples_per_s": round(rate, 2) for name, rate in rates.items()},
        "ratio": round(rates["ours"] / rates["theirs"], 2),
        "ratio_with_patches": round(rates["ours_with_patches"] / rates["theirs"], 2),
        "bytes_ratio": round(made["pixel_values"].nbytes / row.pixels_u8.nbytes, 2),
    }  # fmt: skip


def loader(data: Any, workers: int, steps: int) -> dict[str, Any]:
    """Samples a second of the loader that a run uses, after its first steps."""
    from vlft.data.budget import Budget

    skipped = 2 * workers + 1  # what was prefetched while the first step was waited for
    source = data.steps(0, skipped + steps, (1.0, 1.0), Budget())
    for _ in range(skipped):
        next(source)
    began = time.perf_counter()
    samples = sum(step.samples for step in source)
    spent = time.perf_counter() - began
    rate = round(samples / spent, 2)
    return {"bench": "data_loader", "workers": workers, "cores": os.cpu_count(), "samples_per_s": rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(DATA), default="documents")
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="time the loader with so many workers; 0: do not")
    parser.add_argument("--steps", type=int, default=40, help="of 8 documents or 64 short samples, with --workers")
    parser.add_argument("--startup", type=int, nargs="*", default=[1_000, 10_000], help="numbers of records")
    parser.add_argument("--root", type=Path, default=Path("/tmp/vlft_bench/data"))
    given = parser.parse_args()
    make, batch = DATA[given.data]
    registry = make(given.root, given.records)
    data, pictures, folder = job_of(given.root, registry, batch, given.workers)
    print(json.dumps(one_core(data, pictures, folder, registry, given.rounds)), flush=True)
    if given.workers:
        print(json.dumps({"data": given.data} | loader(data, given.workers, given.steps)), flush=True)
    if given.startup:
        import index

        for line in index.curve(given.root / "startup", given.startup, max(1, given.workers)):
            print(json.dumps({"bench": "startup", **line}), flush=True)


if __name__ == "__main__":
    main()
