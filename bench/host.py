"""The host's time of a row: what Python and PyTorch do until all kernels are launched, on any machine.

    python bench/host.py --rows 3B-full-bf16,3B-lora
    python bench/host.py --rows 3B-lora --checkout . --checkout ../before      # two states of the code, and their ratio

A GPU that is faster than its host waits for it. Here the layers are as many as those of the real model, but narrow, and
run on the CPU by the code that runs on a GPU: Triton's kernels are launched into nothing (hollow_gpu.py), attention is
empty memory, large products are as small as their launch. What is left is the host's work, in processor time of one
thread, the best of many rows. Of the launches themselves, which a real driver makes, only the number is given.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROWS = {
    "3B-full-bf16": ("3B", "full", False),
    "3B-full-fp32": ("3B", "full", True),
    "3B-full-fsdp2": ("3B", "full", True),
    "3B-lora": ("3B", "lora_llm_full_vit", True),
    "3B-lora-bf16": ("3B", "lora_llm_full_vit", False),
    "7B-qlora": ("7B", "qlora", True),
    "qwen3-4B-lora": ("qwen3-4B", "lora_llm_full_vit", True),
}
"""name -> size, strategy, whether trained weights have fp32 masters; FSDP2 has two ranks, of which one is there"""
NARROW = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "vocab_size": 4200,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def hollow(size: str, folder: Path) -> Path:
    """A checkpoint with the layers of a real one and next to no width."""
    import workload

    real = workload.SIZES[size]
    vision = dict(real.vision) | {"num_heads": 2}
    vision["embed_dim" if "embed_dim" in vision else "hidden_size"] = 32
    vision["hidden_size" if "embed_dim" in vision else "out_hidden_size"] = 32
    if "intermediate_size" in vision:
        vision["intermediate_size"] = 28
    workload.SIZES["hollow"] = workload.Size(real.family, dict(real.text) | NARROW, vision, real.tied)
    return workload.make_model("hollow", folder, 50176)


def as_on_a_gpu(launches: Counter[str]) -> None:
    """The code of a GPU, on tensors of the CPU."""
    import hollow_gpu

    hollow_gpu.install()
    import torch

    from vlft.models import attention
    from vlft.models.kernels import on_gpu, pointwise, product

    class Launcher:
        def __init__(self, _: Any, metadata: Any) -> None:
            self.name = metadata.name

        def __call__(self, *_: Any) -> None:
            launches[self.name] += 1

    hollow_gpu.Driver.launcher_cls = Launcher  # type: ignore[assignment,misc]
    for name, one in vars(pointwise).copy().items():
        if hasattr(one, "__wrapped__") and hasattr(on_gpu, name):
            setattr(pointwise, name, getattr(on_gpu, name))
    from vlft.models import attention_on_gpu

    attention.varlen_available = lambda *_: True  # type: ignore[assignment]
    attention._short = lambda: attention_on_gpu  # type: ignore[assignment]
    attention.torch = Named(torch, ops=Named(torch.ops, aten=Flash))  # type: ignore[assignment]
    product.torch = Named(torch, addmm=_addmm)  # type: ignore[assignment]
    product.NARROW = NARROW["hidden_size"] // 2 + 1  # keys and values are narrow, as in the real model


def _addmm(_: Any, x: Any, y: Any, out: Any = None, **__: Any) -> Any:
    """Without its arithmetic."""
    return x.new_empty(x.shape[0], y.shape[1]) if out is None else out


class Named:
    """A module with some names replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self.__dict__.update(names)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Flash:
    """PyTorch's flash attention, without its arithmetic."""

    @staticmethod
    def _flash_attention_forward(q: Any, *_: Any, **__: Any) -> Any:
        import torch

        return torch.empty_like(q), torch.empty(q.shape[1], q.shape[0]), torch.empty(2), torch.empty(0), None

    @staticmethod
    def _flash_attention_backward(_: Any, *qkv: Any, **__: Any) -> Any:
        import torch

        return tuple(map(torch.empty_like, qkv[:3]))


def prepared(row: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A packed model, and a row of one small sample for it."""
    import torch

    from vlft.discovery import load_strategy
    from vlft.grids import tower_inputs
    from vlft.models.forward import PackedVLM
    from vlft.models.load import cast, open_checkpoint, source_of

    size, strategy, masters = ROWS[row]
    made = load_strategy(strategy)[0]  # before the workload, which puts its own checkout first
    source = source_of(open_checkpoint(str(hollow(size, folder))), "bf16", torch.device("cpu"))
    wanted: Any = made
    model = wanted(made.Config()).prepare_model(source)
    cast(model, source.compute_dtype, masters=masters)
    packed = PackedVLM(model, source.parts, source.config.image_token_id).train()
    packed.installed.holds = not row.endswith("fsdp2")
    if masters and packed.installed.holds and hasattr(packed, "split_masters"):  # an older checkout has whole ones
        packed.split_masters()
    for p in packed.parameters():
        p.data = p.data.clone()  # a file's mapping is aligned otherwise than a GPU's memory
    if row.endswith("fsdp2"):
        cut_up(packed)
    grid = torch.tensor([[1, 2, 2]])
    ids = torch.tensor([[20, 21, source.config.image_token_id, *range(22, 40)]])
    places = torch.arange(ids.shape[1])
    return packed, {
        "input_ids_T": ids, "position_ids_4T": places.expand(4, 1, -1).contiguous(), "labels_T": ids.clone(),
        "cu_seqlens": torch.tensor([0, ids.shape[1]], dtype=torch.int32), "max_seqlen": ids.shape[1],
        "pixel_values": torch.randn(4, packed.patch_dim).bfloat16(), "image_grid_thw": grid,
        "supervised_S": places[-3:], "pictured_M": torch.tensor([2]), "tower": tower_inputs(grid, packed.layout),
    }  # fmt: skip


UNITS = {"vision": 11, "llm": 3}
"""Layers of a unit in Qwen2.5-VL-3B, as vlft.engine.fsdp joins them."""


def cut_up(packed: Any) -> None:
    """Into the units of the real model, for two ranks that tell each other nothing."""
    import torch
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from vlft.engine import fsdp

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    words = {"mp_policy": fsdp.mixed_precision_policy("bf16")}
    names = fsdp.layer_names(packed)
    layers = [layer for layer in packed.modules() if type(layer).__name__ in names]
    joined = UNITS if hasattr(fsdp, "units_of") else dict.fromkeys(UNITS, 1)  # an older checkout has a unit a layer
    units = list[list[Any]]()
    for tower, size in joined.items():
        some = [layer for layer in layers if (tower == "vision") == ("Vision" in type(layer).__name__)]
        units += [some[i : i + size] for i in range(0, len(some), size)]
    for unit in units:
        fully_shard(unit, **words)
    fully_shard(packed, **words)


def measure(row: str, rows: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False  # its first look at a shape takes longer than these products
    launches: Counter[str] = Counter()
    as_on_a_gpu(launches)
    with tempfile.TemporaryDirectory() as folder:
        packed, inputs = prepared(row, Path(folder))
    trained = [p for p in packed.parameters() if p.requires_grad]
    times = []
    for _ in range(rows):
        launches.clear()
        began = time.thread_time()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = packed(**inputs)
        half = time.thread_time()
        losses.sum().backward()
        times.append((half - began, time.thread_time() - half))
        for p in trained:
            p.grad = None
    forward, backward = (round(1e3 * min(t[i] for t in times[3:]), 2) for i in (0, 1))
    return {
        "row": row, "layers": len(packed.installed.layers), "forward_ms": forward, "backward_ms": backward,
        "row_ms": round(forward + backward, 2), "kernels_of_triton": sum(launches.values()),
    }  # fmt: skip


def elsewhere(row: str, rows: int, checkout: Path) -> dict[str, Any]:
    """Measured in a process of its own, of the code of a checkout."""
    paths = [checkout, checkout / "plugins", HERE, os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(HERE / "host.py"), "--one", row, "--repeat", str(rows)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{row} of {checkout}: {done.stderr[-1500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument(
        "--checkout", type=Path, action="append", help="of the code; a second is the one to compare with"
    )
    parser.add_argument("--repeat", type=int, default=40, help="rows that are run in one process")
    parser.add_argument("--processes", type=int, default=3, help="of each row and checkout, in turn; the best counts")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given.repeat)))
        return
    checkouts = [path.resolve() for path in given.checkout or [HERE.parent]]
    for row in given.rows.split(","):
        found: list[list[dict[str, Any]]] = [[] for _ in checkouts]
        for _ in range(given.processes):
            for lines, checkout in zip(found, checkouts, strict=True):
                lines.append(elsewhere(row, given.repeat, checkout))
        best = [min(lines, key=lambda line: line["row_ms"]) for lines in found]
        for line, checkout in zip(best, checkouts, strict=True):
            ratio = {"over_the_first": round(line["row_ms"] / best[0]["row_ms"], 2)} if line is not best[0] else {}
            print(json.dumps({**line, "checkout": checkout.name, **ratio}), flush=True)


if __name__ == "__main__":
    main()
