"""vlft with a fault in it, or with what this machine lacks, in as many processes as a launcher starts.

    python tests/faults/spoiled.py WORDS


FAULT is a JSON object: {"kind": ..., "rank": which rank has it (default all), and what the kind needs}.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

from vlft.engine import Engine, base, summing
from vlft.models.forward import PackedVLM
from vlft.optim import KernelAdamW

forward = PackedVLM.forward


def small_memory(self: Any, *, tokens: int, where: str = "forward", **row: Any) -> Tensor:
    """A row of more than `tokens` tokens runs out of memory, in its forward or in its backward."""
    if row["input_ids_T"].shape[1] <= tokens or not self.training:
        return forward(self, **row)
    if where == "forward":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    losses_S = forward(self, **row)
    losses_S.register_hook(_raise)
    return losses_S


def _raise(gradient: Tensor) -> Tensor:
    raise torch.OutOfMemoryError(f"CUDA out of memory in the backward of {len(gradient)} losses.")


def mistaken_room(self: Any, *, room: int, holds: int, **row: Any) -> Tensor:
    """`--memory auto` as on a GPU: it reckons with `room` bytes for a row, and the device has but `holds`."""
    if self.memory.room is None:
        self.memory.room = lambda: room
    losses_S = forward(self, **row)
    if self.training and (used := self.memory.reckoned) > holds:
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {(used - holds) / 2**20:.2f} MiB. GPU 0")
    return losses_S


calls = 0


def not_finite(self: Any, *, rows: list[int], what: str = "loss", **row: Any) -> Tensor:
    """The forwards with these numbers (from 0) give a loss, or only a gradient, that is not finite."""
    global calls
    losses_S = forward(self, **row)
    if self.training:
        calls += 1
        if calls - 1 in rows:
            if what == "loss":
                return losses_S.index_fill(0, torch.tensor([0]), float("inf"))
            losses_S.register_hook(lambda gradient: gradient * float("inf"))
    return losses_S


def slow(self: Any, *, seconds: float, after: int = 0, only_evaluation: bool = False, **row: Any) -> Tensor:
    """Forwards after the first `after` take that much longer."""
    global calls
    calls += 1
    if calls > after and not (only_evaluation and self.training):
        time.sleep(seconds)
    return forward(self, **row)


def dies(self: Any, *, call: int, **row: Any) -> Tensor:
    """The process is killed in this forward."""
    global calls
    calls += 1
    if calls > call:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, **row)


def kills_workers(self: Any, *, call: int, **row: Any) -> Tensor:
    """The system kills the data workers while this forward (from 0) runs."""
    global calls
    calls += 1
    if calls - 1 == call:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal.SIGKILL)
    return forward(self, **row)


def told(path: str, seconds: float, slow: str | None) -> None:
    """Main says in a file, a word a line, which part of the run it is in.

    In the part `slow` (None: in all) everything that is done to a file pauses, so that there is time to be killed in;
    texts are written in two halves with a pause between, so that a kill tears them.
    """
    import pathlib
    import shutil
    from collections.abc import Iterable, Mapping

    from vlft import checkpoint, tracking, train
    from vlft.data import index

    where = ["start"]

    def say() -> None:
        if os.environ.get("RANK", "0") == "0":
            with open(path, "a") as file:
                file.write(where[-1] + "\n")

    def part(owner: Any, name: str, word: str) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            where.append(word)
            say()
            try:
                return real(*args, **options)
            finally:
                where.pop()
                if word == "hand-over":
                    where[:] = ["end"]
                say()

        setattr(owner, name, wrapped)

    def pause(share: float = 1.0) -> None:
        if slow in (None, where[-1]):
            time.sleep(seconds * share)

    def pausing(owner: Any, name: str, share: float = 1.0) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            pause(share)
            return real(*args, **options)

        setattr(owner, name, wrapped)

    def torn(write: Callable[[str], Any], flush: Callable[[], Any], text: str) -> None:
        for half in (text[: len(text) // 2], text[len(text) // 2 :]):
            write(half)
            flush()
            pause(0.5)

    def append(path: pathlib.Path, lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if text:
            with path.open("a") as file:
                torn(file.write, file.flush, text)

    def write_text(self: pathlib.Path, data: str, *args: Any, **options: Any) -> int:
        with self.open("w") as file:
            torn(file.write, file.flush, data)
        return len(data)

    say()
    pausing(index, "_publish")
    part(index, "_build", "index")
    part(index, "_publish", "index")
    part(train, "fit", "step")
    part(train, "train_step", "step")
    part(train, "save_checkpoint", "save")
    part(train, "run_evaluation", "evaluation")
    part(train, "hand_over", "hand-over")
    pausing(PackedVLM, "forward")
    pausing(checkpoint, "save_file")
    pausing(checkpoint, "_sync")
    pausing(os, "replace")
    pausing(pathlib.Path, "rename")
    pausing(shutil, "rmtree")
    pausing(shutil, "copyfile")
    pausing(os, "unlink", 0.1)
    tracking.append = append
    pathlib.Path.write_text = write_text  # type: ignore[method-assign,assignment]


KINDS = {f.__name__: f for f in (small_memory, mistaken_room, not_finite, slow, dies, kills_workers)}


class OfGpu(KernelAdamW):
    """What a GPU has in the place of torch's AdamW, called as that is."""

    def __init__(self, groups: Any, **_: Any) -> None:
        super().__init__(groups, "fp32")


def of_gpu(*, whole: bool) -> None:
    """The optimizer that a GPU has. `whole`: without masters in two halves."""
    from vlft import optim
    from vlft.engine.base import Engine

    # mypy: names of a class and of a property are not to be given to others, which is what a fault does.
    optim.AdamW = OfGpu  # type: ignore[misc,assignment]
    if whole:
        Engine.splits_masters = False  # type: ignore[method-assign,assignment]


def fused_zero() -> None:
    """ZeRO with torch's fused AdamW, as on a GPU. Whoever asks a gradient by itself whether it is finite fails, or
    divides it before the step, or takes the time of a row, for which a GPU would be waited for."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils.timer import ThroughputTimer

    from vlft import optim

    class Fused(torch.optim.AdamW):
        def __init__(self, groups: Any, *, fused: bool) -> None:
            assert not fused
            super().__init__(groups, fused=True)

    # mypy: a class's name is not to be given to another, which is what a fault does.
    optim.AdamW = Fused  # type: ignore[misc]
    DeepSpeedZeroOptimizer._has_inf_or_nan = ThroughputTimer._init_timer = None
    DeepSpeedZeroOptimizer.unscale_and_clip_grads = DeepSpeedZeroOptimizer_Stage3.unscale_and_clip_grads = None


def no_bucket_goes_to_all() -> None:
    """ZeRO-2 without DeepSpeed's way to sum gradients: whoever copies a bucket to be sent, or casts it, fails."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    DeepSpeedZeroOptimizer.allreduce_bucket = DeepSpeedZeroOptimizer._add_to_grad_partition_buffer = None


def layers_by_weights() -> None:
    """ZeRO-3 as DeepSpeed does it."""
    from vlft.engine import zero

    zero.can_gather_layers = lambda *_: False


def no_layer_by_weights() -> None:
    """ZeRO-3 without DeepSpeed's way to gather layers and to sum their gradients: whoever goes it, fails. So does a
    layer that is not on its way when a row comes to it, but for the first; one that is left over behind a row; and more
    in passing than is reckoned with."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.utils import z3_leaf_module

    from vlft.engine.zero_layers import LayerGathering

    def checked(kind: type, name: str, wrong: Callable[[Any], bool]) -> None:
        real = getattr(kind, name)

        def check(self: Any, it: Any, *args: Any, **options: Any) -> Any:
            assert not wrong(it), name
            return real(self, it, *args, **options)

        setattr(kind, name, check)

    checked(PartitionedParameterCoordinator, "fetch_sub_module", z3_leaf_module)
    checked(PartitionedParameterCoordinator, "release_sub_module", z3_leaf_module)
    checked(DeepSpeedZeroOptimizer_Stage3, "reduce_independent_p_g_buckets_and_remove_grads", lambda _: True)
    need, finish, rows = LayerGathering._need, LayerGathering._finish, []

    def needs(self: Any, when: str, layer: Any) -> None:
        assert when == "inference" or not rows or self._at is None or layer in self._ahead or layer in self._here
        need(self, when, layer)
        passing = [
            tensor for gathered in (self._here, self._ahead) for one in gathered.values() for tensor in one.weights
        ]
        passing += self._summing.sent if self._summing else []
        assert sum(tensor.numel() * tensor.element_size() for tensor in passing) <= self.passing_bytes()

    def finishes(self: Any) -> None:
        finish(self)
        rows.append(None)
        assert not any(p.numel() for layer in self._layers.values() for p in layer.weights)

    LayerGathering._need, LayerGathering._finish = needs, finishes  # type: ignore[method-assign]


def fsdp_on_cpu(*, fused: bool = False, unit: int | None = None, copies: int = 1) -> None:
    """FSDP2 where Accelerate ignores it; all but its file is vlft's engine.

    Args:
        fused: the optimizer of a GPU, whose step is made before its norm is read.
        unit: parameters of a unit of layers; None: as many as in a real model, where a tiny one's run is one.
        copies: on so many ranks each shard lies.
    """
    from accelerate import Accelerator
    from torch.distributed.device_mesh import init_device_mesh

    from vlft.engine import fsdp

    if fused:
        of_gpu(whole=False)

    def accelerator(self: Any) -> Accelerator:
        os.environ.pop("ACCELERATE_USE_FSDP")
        return Accelerator(mixed_precision=self.precision)

    def sharding(self: Any) -> dict[str, Any]:
        how = {"reshard_after_forward": True, "mp_policy": fsdp.mixed_precision_policy(self.precision)}
        if copies > 1:
            shape, names = (copies, self.world_size // copies), ("dp_replicate", "dp_shard")
            how["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=names)
        return how

    fsdp.FsdpEngine._accelerator = accelerator  # type: ignore[method-assign]
    fsdp.FsdpEngine._sharding = sharding  # type: ignore[method-assign]
    fsdp.UNIT = unit or fsdp.UNIT


def slow_main(seconds: float, patience: float) -> None:
    """What the main process does alone takes `seconds` once; collectives give up after `patience`."""
    c10d._get_default_timeout = lambda _: timedelta(seconds=patience)  # type: ignore[assignment]
    real, slept = Engine.on_main, []

    def on_main(self: Engine, work: Any) -> Any:
        def slowly() -> Any:
            if not slept:
                slept.append(True)
                time.sleep(seconds)
            return work()

        return real(self, slowly)

    Engine.on_main = on_main  # type: ignore[method-assign]


def gpu_share(gib: float) -> None:
    """The process may hold that much of the GPU; beyond, PyTorch's allocator really is out of memory."""
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)


def hosts() -> None:
    """Hosts tell each other what they have, as where there are GPUs."""
    base.hosts_of_one_machine = lambda _: torch.distributed.new_group(backend="gloo")


def other_data(registry: str) -> None:
    sys.argv[sys.argv.index("--dataset_config_path") + 1] = registry


ONCE: dict[str, Callable[..., None]] = {
    f.__name__: f
    for f in (
        fsdp_on_cpu, hosts, fused_zero, no_bucket_goes_to_all, layers_by_weights, no_layer_by_weights, of_gpu, told,
        other_data, slow_main, gpu_share,
    )
}  # fmt: skip
"""What is done before a process begins; KINDS are done in each forward."""


def spoil(fault: dict[str, Any]) -> None:
    name = fault["kind"]
    options = {key: value for key, value in fault.items() if key not in ("kind", "rank")}
    if name in ONCE:
        ONCE[name](**options)
    elif name != "none":
        kind = KINDS[name]
        PackedVLM.forward = lambda self, **row: kind(self, **options, **row)  # type: ignore[method-assign]


if __name__ == "__main__":
    found = json.loads(os.environ["FAULT"])
    if "large" in found:  # on all ranks: elements of a gradient that is summed by itself
        summing.LARGE = found.pop("large")
    if str(found.get("rank", os.environ.get("RANK", "0"))) in ("all", os.environ.get("RANK", "0")):
        spoil(found)
    from vlft.cli import main

    sys.exit(main())
