"""One rank of several, on one GPU: what a layout costs it besides the network.

    python bench/echo.py --layouts zero3,fsdp2 --size 7B --ranks 2 --steps 16 --warm 16 --profile
    python bench/echo.py --layouts zero3 --deepspeed wide.json --wire 0           # the network takes no time
    python bench/echo.py --size tiny --device cpu --records 16 --steps 2 --warm 1          # does it work?

Where no machine with several GPUs is at hand. The first rank is the real program, with its own share of the weights and
of the samples; the others are echoes: whatever is gathered from them is a copy of what this rank has, and sums are this
rank's times their number. So the weights make no model of use, but as many kernels and as much memory as one. A
collective keeps the stream on which it runs waiting for as long as --wire says, on one of the GPU's processors; it
takes none from the others, as NCCL does, and no rank waits for a slower one. What is measured is an upper bound of the
speed on several GPUs, and what the host and the copies around collectives take. bench/scaling.py measures the real one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import train as bench

ASKED = "VLFT_BENCH_ECHO"
LAYOUTS = ("zero2", "zero3", "fsdp2", "ddp")


def parser() -> argparse.ArgumentParser:
    made = bench.parser()
    made.description = __doc__
    made.set_defaults(rows="full", size="7B")
    made.add_argument("--layouts", default="zero3", help="some of " + ", ".join(LAYOUTS))
    made.add_argument("--ranks", type=int, default=2, help="of which one is real")
    made.add_argument("--batch", type=int, default=8, help="samples of a rank in a step, in one forward")
    made.add_argument("--wire", type=float, default=300, help="10^9 bytes in a second, to and from a rank; 0: no time")
    made.add_argument("--deepspeed", help="another file, for the layouts of DeepSpeed")
    return made


# ---------------------------------------------------------------------------------------------------------------------
# In the process of the real rank
# ---------------------------------------------------------------------------------------------------------------------


def meet_echoes(ranks: int, wire: float) -> None:
    """Connect this process, as rank 0, with `ranks` - 1 that are not there.

    Args:
        wire: 10^9 bytes a second.
    """
    import torch
    from torch import Tensor
    from torch import distributed as dist
    from torch._C._distributed_c10d import _create_work_from_future

    streams: dict[torch.device, torch.cuda.Stream] = {}

    def done(tensor: Tensor) -> Any:
        cuda = tensor.device.type == "cuda"
        future = torch.futures.Future(devices=[tensor.device] if cuda else None)  # type: ignore[var-annotated]
        future.set_result([tensor])
        return _create_work_from_future(future)

    def carry(size: float, opts: Any, like: Tensor, work: Callable[[], None]) -> Any:
        """`work` behind a wait for `size` bytes, on the stream on which NCCL would do it."""
        if like.device.type != "cuda":
            work()
            return done(like)
        current = torch.cuda.current_stream(like.device)
        own = current
        if getattr(opts, "asyncOp", True):
            own = streams.setdefault(like.device, torch.cuda.Stream(like.device))
            own.wait_stream(current)
        with torch.cuda.stream(own):
            if wire:
                torch.cuda._sleep(int(size / wire * CLOCK_GHZ))
            work()
            return done(like)

    class Echoes(dist.ProcessGroup):
        def __init__(self, size: int) -> None:
            super().__init__(0, size)
            self.n = size

        def size(self) -> int:
            return self.n

        def getBackendName(self) -> str:
            return "echo"

        @property
        def group_name(self) -> str:
            return str(dist.distributed_c10d._world.pg_names[self])

        def _sum(self, tensors: Sequence[Tensor], opts: Any) -> None:
            if opts.reduceOp == dist.ReduceOp.SUM:
                for tensor in tensors:
                    tensor.mul_(self.n)

        def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
            size = 2 * (self.n - 1) / self.n * bytes_of(tensors)
            return carry(size, opts, tensors[0], lambda: self._sum(tensors, opts))

        allreduce_coalesced = allreduce

        def reduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
            return carry(bytes_of(tensors), opts, tensors[0], lambda: self._sum(tensors, opts))

        def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Any:
            return carry(bytes_of(tensors), opts, tensors[0], lambda: None)

        def barrier(self, opts: Any = None) -> Any:  # noqa: ARG002
            return done(torch.zeros(1))

        def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
            def copy() -> None:
                for output in outputs[0]:
                    output.copy_(inputs[0])

            return carry((self.n - 1) * bytes_of(inputs), opts, inputs[0], copy)

        def all_gather_single(self, output: Tensor, given: Tensor, opts: Any = None) -> Any:
            def copy() -> None:
                for part in output.view(-1).chunk(self.n):
                    if part.data_ptr() != given.data_ptr():
                        part.copy_(given.view(-1))

            return carry((self.n - 1) * bytes_of([given]), opts, given, copy)

        _allgather_base = all_gather_single  # its name in torch 2.11

        def reduce_scatter_single(self, output: Tensor, given: Tensor, opts: Any = None) -> Any:
            def scatter() -> None:
                mine = given.view(-1).chunk(self.n)[0]
                output.view(-1).copy_(mine)
                self._sum([output], opts)

            return carry((self.n - 1) / self.n * bytes_of([given]), opts, given, scatter)

        _reduce_scatter_base = reduce_scatter_single

        def all_to_all_single(
            self, output: Tensor, given: Tensor, output_sizes: Any = None, input_sizes: Any = None, opts: Any = None
        ) -> Any:
            assert not output_sizes and not input_sizes

            def exchange() -> None:
                for part in output.view(-1).chunk(self.n):
                    part.copy_(given.view(-1).chunk(self.n)[0])

            return carry((self.n - 1) / self.n * bytes_of([given]), opts, given, exchange)

        alltoall_base = all_to_all_single

        def _start_coalescing(self, device: Any) -> None:
            """What follows comes in one launch."""

        def _end_coalescing(self, device: Any) -> Any:  # noqa: ARG002
            return self.coalesced

        def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
            def copy() -> None:
                for output, given in zip(outputs, inputs, strict=True):
                    for part in output.view(-1).chunk(self.n):
                        part.copy_(given.view(-1))

            self.coalesced = carry((self.n - 1) * bytes_of(inputs), opts, inputs[0], copy)
            return self.coalesced

        allgather_into_tensor_coalesced = all_gather_single_coalesced

        def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
            def scatter() -> None:
                for output, given in zip(outputs, inputs, strict=True):
                    output.copy_(given.view(-1).chunk(self.n)[0])
                self._sum(outputs, opts)

            self.coalesced = carry((self.n - 1) / self.n * bytes_of(inputs), opts, inputs[0], scatter)
            return self.coalesced

        reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    dist.Backend.register_backend("echo", lambda _store, _rank, size, _timeout: Echoes(size), devices=["cpu", "cuda"])
    new_group = dist.new_group

    def group_of_echoes(ranks: Sequence[int] | None = None, **options: Any) -> Any:
        return new_group(ranks, **options | {"backend": "echo"})

    dist.new_group = group_of_echoes
    dist.init_process_group("echo", store=dist.HashStore(), rank=0, world_size=ranks)


CLOCK_GHZ = 1.7
"""Of an H200's processors at work."""


def bytes_of(tensors: Sequence[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def run(asked: dict[str, Any]) -> dict[str, Any]:
    given = argparse.Namespace(**asked["given"])
    given.root, given.out = Path(given.root), Path(given.out)
    name = "-".join([given.layouts, *([Path(given.deepspeed).stem] if given.deepspeed else [])])
    given.profile_path = given.out / f"profile-echo-{name}.txt" if given.profile else None
    given.line = None
    meet_echoes(given.ranks, given.wire)
    ours = {"per_device_train_batch_size": str(given.batch), "gradient_accumulation_steps": "1"}
    if given.layouts.startswith("zero"):
        ours["deepspeed"] = given.deepspeed or given.layouts
    return bench.run_vlft(replace(bench.Row(given.size, asked["strategy"]), ours=ours), given)


# ---------------------------------------------------------------------------------------------------------------------
# In the process that asks for layouts
# ---------------------------------------------------------------------------------------------------------------------


def measure(layout: str, strategy: str, given: argparse.Namespace) -> dict[str, Any]:
    facts = {"layout": layout, "ranks": given.ranks, "size": given.size, "strategy": strategy, "wire": given.wire}
    result, log = given.root / "line.json", given.root / "log.txt"
    result.unlink(missing_ok=True)
    options = {name: str(v) if isinstance(v, Path) else v for name, v in vars(given).items()} | {"layouts": layout}
    env = bench.environment(given, "vlft") | {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(given.ranks), "LOCAL_WORLD_SIZE": str(given.ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555",
        ASKED: json.dumps({"given": options, "strategy": strategy, "line": str(result)}),
    }  # fmt: skip
    env |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if layout == "fsdp2" else {}
    wrong = bench.run([sys.executable, str(Path(__file__).resolve())], given.limit, env, log)
    with (given.out / "log.txt").open("a") as whole:
        whole.write(f"==== {layout}\n{log.read_text(errors='replace')[-200_000:]}\n")
    if wrong or not result.exists():
        return facts | {"error": wrong or "no line"}
    return facts | json.loads(result.read_text())


def main() -> None:
    bench.end_with_children()
    given = parser().parse_args()
    for strategy in given.rows.split(","):
        bench.prepare([(strategy, bench.Row(given.size, strategy))], given)
        for layout in given.layouts.split(","):
            line = json.dumps(measure(layout, strategy, given))
            print(line, flush=True)
            with (given.out / "lines.jsonl").open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    if ASKED in os.environ:  # data workers that are spawned import this module under another name
        wanted = json.loads(os.environ.pop(ASKED))
        Path(wanted["line"]).write_text(json.dumps(run(wanted)))
    else:
        main()
