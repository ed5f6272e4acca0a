"""Seconds and host memory of a full checkpoint (weights and Adam's states, fp32) of a model of a given size.

    python bench/checkpoint.py [--size 7b] [--folder /dev/shm/vlft_bench]

A Qwen2.5-VL of that size with random weights takes one step with `full` and saves. For 7b: about 135 GB of GPU memory
and 100 GB in the folder. Memory is of the process: resident size before the save, and its peak during it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

SIZES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "7b": (
        {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
         "intermediate_size": 18944, "vocab_size": 152064},
        {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 3584},
    ),
    "tiny": ({}, {}),
}  # fmt: skip


def make_model(size: str, folder: Path) -> Path:
    """A checkpoint of that size beside the tiny one's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from vlft.testing.tiny import make_checkpoint

    base = make_checkpoint("qwen2_5_vl", folder, dtype="bfloat16")
    llm, vision = SIZES[size]
    if llm:
        config: Any = AutoConfig.from_pretrained(base)
        for part, values in ((config.text_config, llm), (config.vision_config, vision)):
            for name, value in values.items():
                setattr(part, name, value)
        config.text_config.layer_types = ["full_attention"] * llm["num_hidden_layers"]
        head = llm["hidden_size"] // llm["num_attention_heads"]
        config.text_config.rope_parameters = config.text_config.rope_parameters | {
            "mrope_section": [head // 8, 3 * head // 16, 3 * head // 16]
        }
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        for old in base.glob("*.safetensors"):
            old.unlink()
        model.save_pretrained(base)
        del model
        torch.cuda.empty_cache()
    return base


def resident_gb() -> float:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/vlft_bench"))
    parser.add_argument("--model_folder", type=Path, default=Path("/tmp/vlft_bench_model"))
    given = parser.parse_args()
    from runs import command, write_data

    from vlft import checkpoint, train
    from vlft.cli import parse

    for folder in (given.folder, given.model_folder):
        shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    model = make_model(given.size, given.model_folder)
    print(f"model made in {time.monotonic() - began:.0f} s", flush=True)
    registry = write_data(given.folder / "data", 4)
    found: dict[str, Any] = {"size": given.size}
    real = train.save_checkpoint

    def measured(job: Any) -> None:
        peak = before = resident_gb()
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.05):
                peak = max(peak, resident_gb())

        watcher = threading.Thread(target=watch)
        watcher.start()
        at = time.monotonic()
        real(job)
        seconds = time.monotonic() - at
        done.set()
        watcher.join()
        (saved,) = checkpoint.complete(job.folder.checkpoints)
        size = sum(f.stat().st_size for f in saved.iterdir()) / 1e9
        at = time.monotonic()
        checkpoint.read_state(saved)
        found.update(
            parameters=sum(p.numel() for p in job.model.parameters()), gb=round(size, 1), save_s=round(seconds, 1),
            gb_per_s=round(size / seconds, 2), check_s=round(time.monotonic() - at, 1), host_gb_before=round(before, 1),
            host_gb_peak=round(peak, 1), cores=os.cpu_count(),
        )  # fmt: skip

    train.save_checkpoint = measured
    train.hand_over = lambda _: None
    words = command(model, registry, given.folder / "out", "full", max_steps=1, per_device_train_batch_size=1)
    train.main(parse(words))
    print(json.dumps(found))
    shutil.rmtree(given.folder, ignore_errors=True)
    shutil.rmtree(given.model_folder, ignore_errors=True)


if __name__ == "__main__":
    main()
