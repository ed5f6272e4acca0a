"""Attention over segments of unequal length by cuDNN, on Hopper: 0.6 of the time of the flash kernels inside PyTorch.

PyTorch's own way to cuDNN builds a graph at every call, which takes the host 50 ms, so it is asked for through its own
package (`nvidia-cudnn-frontend`). A graph serves every row whose segments, longest segment and tokens round up to the
same numbers: segments that are not there are empty. A few graphs serve a whole training; the first ones take a second
each, in which cuDNN makes its kernels, later ones 50 to 80 ms.

T tokens of a row, H heads, K key-value heads, D head size, S segments.
"""

from __future__ import annotations

import warnings
from collections import deque
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

OLDEST = 91000
"""cuDNN before 9.10 was not tried."""
FEWEST, SHORTEST = 8, 256
"""Segments (and tokens of all of them), and tokens of the longest one, that a graph has at least."""
ONE = (1, 1, 1, 1)

# What a graph's tensors are called when it runs.
Q, K, V, OUT, STATS, D_OUT, D_Q, D_K, D_V, Q_STARTS, K_STARTS, STATS_STARTS, Q_LENGTHS, K_LENGTHS = range(1, 15)


@lru_cache(maxsize=8)
def available(device: torch.device) -> bool:
    """Whether this GPU's attention runs by cuDNN."""
    return _faster(device) and not trouble()


def missing(device: torch.device) -> str:
    """Why this GPU does without, though it is one that cuDNN is faster on."""
    return trouble() if _faster(device) else ""


def _faster(device: torch.device) -> bool:
    """Hopper is what it was measured on. AMD's GPUs have numbers of their own, some alike."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


@lru_cache(maxsize=1)
def trouble() -> str:
    """Why cuDNN's package cannot be used on this machine; empty where it can."""
    try:
        import cudnn

        version = int(cudnn.backend_version())
    except Exception as error:  # it looks for libraries, and has errors of its own where it finds none, or two
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200].rstrip(": .")
    return f"cuDNN {version} is too old" if version < OLDEST else ""


def said(why: str) -> str:
    """One line for the start of a run."""
    return (
        f"attention runs by PyTorch's flash kernels, since cuDNN's cannot be had ({why}): a step takes some 6% longer; "
        "pip install 'nvidia-cudnn-frontend<1.29' mends it."
    )


def _up(n: int, least: int = 1, parts: int = 1) -> int:
    """To a power of two, or to one of the numbers that part the way from one to the next into `parts`."""
    power = max(least, 1 << max(n - 1, 0).bit_length())
    part = max(power // (2 * parts), 1) if parts > 1 else power
    return max(least, -(-n // part) * part)


@dataclass(frozen=True)
class Shape:
    """What a graph is built for."""

    segments: int
    longest: int
    tokens: int
    """0 forward, whose graph does not ask"""
    heads: int
    kv_heads: int
    size: int
    scale: float
    causal: bool
    kind: torch.dtype
    device: torch.device
    deterministic: bool


class Segments:
    """Of a row, as graphs want them."""

    def __init__(self, borders: Tensor, longest: int, tokens: int) -> None:
        """
        Args:
            borders: (S + 1,) int32, on the device.
            longest: an upper bound of the segments' lengths.
        """
        assert borders.dtype == torch.int32  # as graphs read them
        segments = _up(len(borders) - 1, FEWEST)
        self.sizes = segments, _up(longest, SHORTEST), _up(tokens, FEWEST, 4)
        # Those that are not there begin and end behind the last.
        self.borders = torch.cat((borders, borders[-1:].expand(segments + 1 - len(borders))))
        self.lengths = self.borders.diff()
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def plan(self, q_THD: Tensor, kv_heads: int, scale: float, *, causal: bool) -> Plan:
        """Once for all layers that are alike: a look at each takes the host as long as a launch."""
        _, heads, size = q_THD.shape
        key = heads, kv_heads, size, scale, causal, q_THD.dtype, torch.are_deterministic_algorithms_enabled()
        if key not in self._plans:
            segments, longest, tokens = self.sizes
            shapes = [
                Shape(segments, longest, n, heads, kv_heads, size, scale, causal, q_THD.dtype, q_THD.device, key[-1])
                for n in (0, tokens)
            ]
            starts = {name: self.borders * width for name, width in (
                (Q_STARTS, heads * size), (K_STARTS, kv_heads * size), (STATS_STARTS, heads)
            )}  # fmt: skip
            numbers = {Q_LENGTHS: self.lengths, K_LENGTHS: self.lengths, **starts}
            self._plans[key] = Plan(shapes[0], shapes[1], numbers)
        return self._plans[key]


_recent: deque[tuple[Tensor, tuple[int, int, int], Segments]] = deque(maxlen=4)


def segments_of(borders: Tensor, longest: int, tokens: int) -> Segments:
    """Once for all layers of a row: they are called with the same tensor, in which nothing was written since."""
    key = longest, tokens, 0 if borders.is_inference() else borders._version
    for known, same, found in _recent:
        if known is borders and same == key:
            return found
    found = Segments(borders, longest, tokens)
    _recent.append((borders, key, found))
    return found


@dataclass(frozen=True)
class Plan:
    """Of the layers of a row that are alike."""

    forward_shape: Shape
    backward_shape: Shape
    numbers: dict[int, Tensor]
    """where segments begin, and their lengths"""

    @cached_property
    def forward(self) -> Graph | None:
        return graph(self.forward_shape, backward=False)

    @cached_property
    def backward(self) -> Graph | None:
        return graph(self.backward_shape, backward=True)


@dataclass(frozen=True)
class Graph:
    built: Any
    handle: Any
    workspace: int
    """bytes"""

    def run(self, tensors: dict[int, Tensor]) -> None:
        import cudnn

        device = tensors[Q].device
        cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream(device).cuda_stream)
        space = torch.empty(self.workspace, dtype=torch.uint8, device=device)
        self.built.execute(tensors, space, handle=self.handle)


@lru_cache(maxsize=8)
def _handle(device: torch.device) -> Any:
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


@lru_cache(maxsize=256)
def graph(shape: Shape, *, backward: bool) -> Graph | None:
    """None where cuDNN does not build one, which is said once.

    Raises:
        torch.OutOfMemoryError: there was no memory for it, so that nothing is known of this shape.
    """
    import cudnn

    try:
        return _build(cudnn, shape, backward=backward)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an older cuDNN has no kernel, an older package no such option
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        warnings.warn(
            f"cuDNN built no attention for {shape} ({why}); PyTorch's flash kernels run instead.", stacklevel=2
        )
        return None


def _build(cudnn: Any, shape: Shape, *, backward: bool) -> Graph:
    handle = _handle(shape.device)
    kind = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}[shape.kind]
    whole, wide = cudnn.data_type.INT32, cudnn.data_type.FLOAT
    made = cudnn.pygraph(io_data_type=kind, intermediate_data_type=wide, compute_data_type=wide, handle=handle)

    def layout(heads: int, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        dims = (shape.segments, heads, shape.longest, size)
        return dims, (shape.longest * heads * size, size, heads * size, 1)

    def numbers(uid: int, count: int) -> Any:
        return made.tensor(uid=uid, name=str(uid), dim=(count, 1, 1, 1), stride=ONE, data_type=whole)

    def given(uid: int, heads: int, starts: Any, size: int = shape.size, dtype: Any = kind) -> Any:
        dims, strides = layout(heads, size)
        tensor = made.tensor(uid=uid, name=str(uid), dim=dims, stride=strides, data_type=dtype)
        tensor.set_ragged_offset(starts)
        return tensor

    def result(tensor: Any, uid: int, heads: int, starts: Any, size: int = shape.size, dtype: Any = kind) -> None:
        dims, strides = layout(heads, size)
        tensor.set_output(True).set_uid(uid).set_dim(dims).set_stride(strides).set_data_type(dtype)
        tensor.set_ragged_offset(starts)

    heads, kv_heads = shape.heads, shape.kv_heads
    of_q, of_k, of_stats = (numbers(uid, shape.segments + 1) for uid in (Q_STARTS, K_STARTS, STATS_STARTS))
    q, k, v = given(Q, heads, of_q), given(K, kv_heads, of_k), given(V, kv_heads, of_k)
    how = {
        "attn_scale": shape.scale, "use_causal_mask": shape.causal, "use_padding_mask": True,
        "seq_len_q": numbers(Q_LENGTHS, shape.segments), "seq_len_kv": numbers(K_LENGTHS, shape.segments),
    }  # fmt: skip
    if backward:
        out, d_out = given(OUT, heads, of_q), given(D_OUT, heads, of_q)
        stats = given(STATS, heads, of_stats, 1, wide)
        # Without the row's tokens, its workspace is one of all segments as long as the longest.
        d_q, d_k, d_v = made.sdpa_backward(
            q=q, k=k, v=v, o=out, dO=d_out, stats=stats, max_total_seq_len_q=shape.tokens,
            max_total_seq_len_kv=shape.tokens, use_deterministic_algorithm=shape.deterministic, **how,
        )  # fmt: skip
        result(d_q, D_Q, heads, of_q)
        result(d_k, D_K, kv_heads, of_k)
        result(d_v, D_V, kv_heads, of_k)
    else:
        out, stats = made.sdpa(q=q, k=k, v=v, is_inference=False, **how)
        result(out, OUT, heads, of_q)
        result(stats, STATS, heads, of_stats, 1, wide)
    made.validate()
    made.build_operation_graph()
    made.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    made.check_support()
    made.build_plans()
    return Graph(made, handle, max(int(made.get_workspace_size()), 1))


@dataclass(frozen=True)
class ByCudnn:
    """What the backward pass needs beside queries, keys, values and the output."""

    plan: Plan
    stats_TH: Tensor


def takes(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> bool:
    """Whether tensors lie as its graphs have them, in numbers that fit into 32 bits."""
    size, close = q_THD.shape[2], all(x.is_contiguous() for x in (q_THD, k_TKD, v_TKD))
    return close and 0 < q_THD.numel() < 2**31 and size % 8 == 0 and size <= 128


def attend(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    borders: Tensor,
    longest: int,
    scale: float,
    *,
    causal: bool,
    learns: bool,
) -> tuple[Tensor, ByCudnn] | None:
    """(T, H, D), and what `attend_backward` takes; None where cuDNN has no kernel for it.

    Args:
        borders: (S + 1,) int32, on the device.
        longest: an upper bound of the segments' lengths.
    """
    plan = segments_of(borders, longest, len(q_THD)).plan(q_THD, k_TKD.shape[1], scale, causal=causal)
    if plan.forward is None or (learns and plan.backward is None):
        return None
    out, stats = torch.empty_like(q_THD), q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32)
    plan.forward.run({Q: q_THD, K: k_TKD, V: v_TKD, OUT: out, STATS: stats, **plan.numbers})
    return out, ByCudnn(plan, stats)


def attend_backward(
    kept: ByCudnn, qkv: tuple[Tensor, Tensor, Tensor], out_THD: Tensor, d_out_THD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (T, H, D), k and v (T, K, D)."""
    assert kept.plan.backward is not None
    q, k, v = qkv
    d_q, d_k, d_v = (torch.empty_like(x) for x in qkv)
    kept.plan.backward.run({
        Q: q, K: k, V: v, OUT: out_THD, D_OUT: d_out_THD.contiguous(), STATS: kept.stats_TH, D_Q: d_q, D_K: d_k,
        D_V: d_v, **kept.plan.numbers,
    })  # fmt: skip
    return d_q, d_k, d_v
