"""What products lose beside what is sent: two or more GPUs of one host, JSON lines at once.

    torchrun --nproc_per_node gpu bench/beside.py
    torchrun --nproc_per_node gpu bench/beside.py --zero
    torchrun --nproc_per_node 2 bench/beside.py --device cpu --mib 1 --rounds 2 --tokens 64      # does it work?

On two H200s (2026-11-30) the products lost 4.4 ms a GB beside NCCL's all_gather by its own choice, more with fewer
blocks (16: 5.4, 8: 7.1, 4: 10, 2: 15), 2.9 beside copies, and 2.1 beside NCCL's own; its all_to_all took 3.9, its own
copies 3.1.

Sharded training sends while the GPU multiplies, and NCCL's kernels take multiprocessors from the products. Here the
products of a layer of the 3B language model run on one stream and a unit of FSDP2 is sent on another, again and again,
in several ways:

* `all_gather` and `all_to_all`: NCCL's own, in groups with the most blocks (`ctas`) that each may take, 0: its choice;
* `copies`: from the others' memory by copies between cards alone, which should take no multiprocessor (PyTorch's
  symmetric memory; the barriers before and after them are a kernel of one block);
* with --zero, in the place of all of these, NCCL's own copies between cards, of symmetric memory (its "zero CTA"
  policy).

A line of each way has: `send_ms` of one sending without products; `products_ms` of all products without sending;
`both_ms` until they are done with --sends sendings beside them, `slower`, the ratio of these two, and `sent_ms` until
these are done, too; `gb` that each rank received, and `lost_ms_per_gb`, what a GB costs the products. Times are the
best of four and the slowest rank's. By default there are as many products and sendings as in a third of a step of 3B
`full` under FSDP2, 8 samples a GPU; here the sendings are not spread over it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

# Multicast can put the host's GPUs out of service; a number of blocks in the environment would be in force everywhere.
os.environ |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
os.environ.pop("NCCL_MAX_CTAS", None)

import torch
import torch.distributed as dist

CTAS = (0, 2, 4, 8, 16, 32)
WIDTH, INNER = 2048, 11008
"""Of Qwen2.5-VL-3B's language model."""


class Products:
    """Of a layer, about as many as its forward and backward have."""

    def __init__(self, tokens: int, device: torch.device, width: int, inner: int) -> None:
        def made(*shape: int) -> torch.Tensor:
            return torch.randn(shape, dtype=torch.bfloat16, device=device)

        self.x, self.up, self.y, self.down = (
            made(tokens, width), made(width, inner), made(tokens, inner), made(inner, width),
        )  # fmt: skip

    def __call__(self) -> None:
        for _ in range(2):
            self.x @ self.up
            self.y @ self.down
            self.y @ self.up.T
            self.x.T @ self.y


def ways(shard: torch.Tensor, device: torch.device) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """Each with what a line says of it. `shard` is what a rank holds; all gather all shards."""
    world = dist.get_world_size()
    whole = shard.new_empty(world * shard.numel())
    got = torch.empty_like(whole)
    for ctas in CTAS if device.type == "cuda" else (0,):
        group = dist.new_group(pg_options=_options("max_ctas", ctas)) if ctas else dist.group.WORLD
        yield {"way": "all_gather", "ctas": ctas}, lambda g=group: dist.all_gather_into_tensor(whole, shard, group=g)
        yield {"way": "all_to_all", "ctas": ctas}, lambda g=group: dist.all_to_all_single(got, whole, group=g)
    if device.type == "cuda":
        yield {"way": "copies"}, copies(shard, whole)


def zero(shard: torch.Tensor) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    import torch.distributed._symmetric_memory as symmetric

    symmetric.set_backend("NCCL")
    group = dist.new_group(pg_options=_options("cta_policy", dist.ProcessGroupNCCL.NCCL_CTA_POLICY_ZERO))
    dist.barrier(group=group)  # else there is no communicator yet in which memory could be registered
    world = dist.get_world_size()
    whole, got = (symmetric.empty(world * shard.numel(), dtype=shard.dtype, device=shard.device) for _ in range(2))
    for one in (whole, got):
        symmetric.rendezvous(one, group=group.group_name)
    mine = whole.chunk(world)[dist.get_rank()]
    yield {"way": "all_gather", "ctas": "zero"}, lambda: dist.all_gather_into_tensor(whole, mine, group=group)
    yield {"way": "all_to_all", "ctas": "zero"}, lambda: dist.all_to_all_single(got, whole, group=group)


def _options(name: str, value: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    setattr(options.config, name, value)
    return options


def copies(shard: torch.Tensor, whole: torch.Tensor) -> Callable[[], None]:
    import torch.distributed._symmetric_memory as symmetric

    here = symmetric.empty(shard.numel(), dtype=shard.dtype, device=shard.device)
    here.copy_(shard)
    handle = symmetric.rendezvous(here, dist.group.WORLD)
    world = dist.get_world_size()
    chunks = whole.chunk(world)
    chunks[handle.rank].copy_(here)
    theirs = [handle.get_buffer(rank, here.shape, here.dtype) for rank in range(world)]

    def send() -> None:
        handle.barrier()
        for step in range(1, world):  # each rank begins with another, so that no link is asked by all
            rank = (handle.rank - step) % world
            chunks[rank].copy_(theirs[rank])
        handle.barrier(channel=1)

    return send


class Clock:
    """Of what is asked for on two streams, the ranks beginning together."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self.beside = torch.cuda.Stream(priority=-1) if self.on_gpu else None

    def __call__(self, work: Callable[[], Any], times: int, send: Callable[[], Any], sends: int) -> tuple[float, float]:
        """Milliseconds until `work` is done, and until all is: of the slowest rank, the best of four."""
        found = torch.tensor([self._once(work, times, send, sends) for _ in range(4)], device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        worked, sent = found.amin(0).tolist()
        return worked, sent

    def _once(self, work: Callable[[], Any], times: int, send: Callable[[], Any], sends: int) -> tuple[float, float]:
        self._wait()
        dist.barrier()
        self._wait()
        began = time.perf_counter()
        with torch.cuda.stream(self.beside):  # which is the current one, where there is none
            for _ in range(sends):
                send()
        for _ in range(times):
            work()
        if self.on_gpu:
            torch.cuda.current_stream().synchronize()
        worked = time.perf_counter()
        self._wait()
        return 1e3 * (worked - began), 1e3 * (time.perf_counter() - began)

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, default=512, help="of a unit in bf16, whole")
    parser.add_argument("--rounds", type=int, default=60, help="of the products")
    parser.add_argument("--sends", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=4600)
    parser.add_argument("--zero", action="store_true", help="NCCL's copies of symmetric memory alone")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = parser.parse_args()
    if given.zero and given.device != "cuda":
        parser.error("--zero is NCCL's, on GPUs alone.")
    device = torch.device(given.device, int(os.environ["LOCAL_RANK"]) if given.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    width, inner = (WIDTH, INNER) if device.type == "cuda" else (64, 256)
    work, clock = Products(given.tokens, device, width, inner), Clock(device)
    shard = torch.ones(int(given.mib * 2**19) // dist.get_world_size(), dtype=torch.bfloat16, device=device)
    gb = given.sends * shard.nbytes * (dist.get_world_size() - 1) / 1e9

    def nothing() -> None: ...

    for _ in range(10 if device.type == "cuda" else 1):
        clock(work, given.rounds, nothing, 0)  # cold cards are faster
    for facts, send in zero(shard) if given.zero else ways(shard, device):
        _, sending = clock(nothing, 0, send, given.sends)
        alone, _ = clock(work, given.rounds, nothing, 0)
        both, all_done = clock(work, given.rounds, send, given.sends)
        line = facts | {
            "send_ms": sending / given.sends, "products_ms": alone, "both_ms": both, "slower": both / alone,
            "sent_ms": all_done, "gb": gb, "lost_ms_per_gb": (both - alone) / gb, "gpus": dist.get_world_size(),
        }  # fmt: skip
        if not dist.get_rank():
            print(
                json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()}), flush=True
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
