"""Functions that run on the ranks of a gloo group, in processes of their own."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch


def on_ranks(work: Callable[..., None], ranks: int, *given: Any) -> None:
    """`work(rank, *given)` on each; it is a function of a module, since processes are spawned."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    # PyTorch has no types for it.
    torch.multiprocessing.spawn(_rank, (work, ranks, port, *given), ranks)  # type: ignore[attr-defined,no-untyped-call]


def _rank(number: int, work: Callable[..., None], ranks: int, port: int, *given: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=number, world_size=ranks)
    work(number, *given)
    torch.distributed.destroy_process_group()
