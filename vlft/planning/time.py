"""Seconds of a step on one GPU: products, attention, what only moves memory, adapters, the optimizer, and the
host."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

from vlft.models.flops import Shape, Training, Work, unit_flops
from vlft.planning.gpus import Gpu
from vlft.planning.memory import NF4, Memory, Static

PRODUCTS, ATTENTION, BY_CUDNN, WINDOWS, BANDWIDTH = 0.72, 0.17, 0.27, 0.33, 0.8
"""Shares of the peaks that are reached, of arithmetic or (the last two) of bandwidth. Attention's are from profiles of
an H200, where cuDNN's takes 0.63 of the time of PyTorch's flash kernels; the other two were assumed. docs/planning.md
says what comes of them."""
LAYER, FORWARD, ADAPTED, PACKED, ANEW, STEP = 2.2e-3, 0.5e-3, 0.9e-3, 3e-3, 2.2e-3, 70e-3
"""Seconds of the host, with a driver as slow as that of the machines of docs/performance.md, fitted to the runs of
bench/planning.py of 2026-11-28 there. Of a layer: forward and backward; forward alone (frozen, or computed again); more
for its adapters; more for weights of 4 bits; more where layers hold no joined weights, so that each product makes them
(from two runs with `--memory low`). Of a step: the update, the wait at its end, and what the library of products loads
for rows of new lengths, which runs of 14 steps are full of."""
SHARP = 3
"""A step takes longer than GPU or host alone, the more the closer they are: (gpu^SHARP + host^SHARP)^(1/SHARP). Fitted
as the host's seconds are."""


@dataclass(frozen=True)
class Time:
    """Seconds of a mean step of one rank."""

    products: float
    attention: float
    again: float
    moving: float
    adapters: float
    """what they move; their arithmetic is among the products"""
    optimizer: float
    host: float
    """beside all the others"""

    @property
    def device(self) -> float:
        """of the GPU"""
        return self.products + self.attention + self.again + self.moving + self.adapters + self.optimizer

    @property
    def step(self) -> float:
        return float((self.device**SHARP + self.host**SHARP) ** (1 / SHARP))


_PAIRS = ("causal_pairs", "frame_pairs")


def time_of(
    shape: Shape,
    training: Training,
    work: Work,
    static: Static,
    memory: Memory,
    gpu: Gpu,
    *,
    rows: float,
    row_share: float,
) -> Time:
    """
    Args:
        work: of a mean step.
        rows: of a mean step.
        row_share: the mean row's tokens over the largest row's, for which `memory` was worked out.
    """
    costs = dict(zip((f.name for f in fields(Work)), unit_flops(shape, training), strict=True))
    amounts = dict(zip((f.name for f in fields(Work)), astuple(work), strict=True))
    flops = {name: costs[name] * amounts[name] for name in costs}
    attention = sum(flops[name] for name in _PAIRS)
    products = sum(flops.values()) - attention - flops["window_pairs"]
    heads = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    # Numbers read and written by the kernels between the products, forward and backward, of one layer and token.
    llm = 24 * shape.width + 4 * heads + 11 * shape.inner
    gated = len(shape.names.up)
    vit = 24 * shape.vit_width + 12 * shape.vit_width + (11 if gated == 2 else 6) * shape.vit_inner
    learns, learns_text = static.learning[0] / max(shape.vit_depth, 1), static.learning[1] / shape.layers
    # Queries, keys, values and the output; in the backward pass all of their gradients beside them.
    in_windows = 2.0 * amounts["patches"] * len(shape.windowed) * shape.vit_width * (4 + 7 * learns)
    vit = shape.vit_depth * vit - len(shape.windowed) * 12 * shape.vit_width  # there the rotation is attention's
    moved = 2.0 * amounts["tokens"] * shape.layers * llm * (0.4 + 0.6 * learns_text)
    moved += 2.0 * amounts["patches"] * vit * (0.4 + 0.6 * learns)
    moved += 8.0 * amounts["supervised"] * shape.vocabulary  # written, read, and in the backward pass once more
    trained = sum(part.trainable for part in static.parts)
    if static.is_split:
        moved += rows * 2 * static.copies.held
    elif static.masters and not static.sharded:
        moved += rows * 2 * 6.0 * trained  # fp32 weights are cast for the forward and for the backward
    moved += rows * 2 * sum(part.quantised for part in static.parts) * (NF4 + 2)
    adapted = 2.0 * (amounts["patches"] * static.adapted[0] + amounts["tokens"] * static.adapted[1])
    states = 2 * static.states + 2 * static.weights * (trained / max(sum(p.parameters for p in static.parts), 1))
    return Time(
        products=products / (PRODUCTS * gpu.peak),
        attention=attention / ((BY_CUDNN if gpu.by_cudnn else ATTENTION) * gpu.peak)
        + in_windows / (WINDOWS * gpu.bandwidth),
        again=memory.again * row_share * rows / (PRODUCTS * gpu.peak),
        moving=moved / (BANDWIDTH * gpu.bandwidth),
        adapters=adapted / (BANDWIDTH * gpu.bandwidth),
        optimizer=(states + 2 * static.gradients) / (BANDWIDTH * gpu.bandwidth),
        host=STEP + rows * host_of(shape, static, memory),
    )


def host_of(shape: Shape, static: Static, memory: Memory) -> float:
    """Seconds of one row."""
    learning = sum(static.learning)
    frozen = shape.vit_depth + shape.layers - learning
    forwards = frozen + sum(keep == "input" for each in memory.keeps for keep in each)
    own = LAYER * learning + FORWARD * forwards
    more = ADAPTED * static.copies.adapted + PACKED * static.copies.packed
    return own + more + (0.0 if memory.holds else ANEW * learning)
