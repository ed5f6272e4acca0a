"""Memory of a training on one GPU, by component, at its worst moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from vlft.config import MemoryPlan
from vlft.family import PARTS, Part, Parts
from vlft.models.flops import Shape
from vlft.models.kernels.block import Keep
from vlft.models.kernels.memory import CONTEXT, LOGITS, MARGIN, Cost, Sizes, Tower, choose, fixed_by, peak
from vlft.models.load import is_quantised
from vlft.planning.load import Row
from vlft.proof import logical_size

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4 whose scales, one to 64 weights, are quantised again to 8 bits, 256 to a scale."""
PIECES = 1.03
"""What the allocator holds over what it gives out."""


@dataclass(frozen=True)
class PartSize:
    part: Part
    parameters: int
    trainable: int
    bytes: float
    """of weights, trained ones as the run keeps them"""


@dataclass(frozen=True)
class Static:
    """What is there whatever a row holds."""

    parts: list[PartSize]
    gradients: float
    states: float
    largest: float
    """gradient of the largest single weight: it exists twice for a moment"""
    layer_gradients: tuple[float, float]
    """of one layer of the vision tower and of the language model"""
    learning: tuple[int, int]
    """layers of either that learn"""
    adapted: tuple[float, float] = (0.0, 0.0)
    """numbers that the adapters read and write for a patch and for a token, in all layers, forward and backward"""

    @property
    def weights(self) -> float:
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    weights: float
    gradients: float
    states: float
    kept: float
    """by the layers, for the backward pass"""
    logits: float
    buffers: float
    """pixels, position tables, the context"""
    peak: float
    """At the worst moment: less than the sum, where gradients come as kept values go."""
    keeps: tuple[list[Keep], list[Keep]]
    again: float
    """FLOPs of one row that are done a second time"""


BYTES = {"adamw": (4, 4, 8.0), "adamw_bf16": (2, 2, 4.0), "adamw_8bit": (2, 2, 2.0 + 8 / 256)}
"""Of a trained number by the optimizer: weight, gradient, states."""


def static_of(model: nn.Module, parts: Parts, tied: bool, optimizer: str, compute: int, shape: Shape) -> Static:
    """
    Args:
        model: prepared, on any device, the meta device too.
        compute: bytes of a number in the compute dtype, in which frozen weights lie.
    """
    weight, gradient, states = BYTES[optimizer]
    quantised = {
        id(p) for m in model.modules() if is_quantised(m) for n, p in m.named_parameters(recurse=False) if n == "weight"
    }
    numbers: dict[Part, list[float]] = {part: [0, 0, 0.0] for part in PARTS}
    layer: list[dict[str, int]] = [{}, {}]
    largest = 0
    for name, p in model.named_parameters():
        at = numbers[parts.part_of(name, tied_head=tied)]
        size = logical_size(p)
        at[0] += size
        at[2] += size * (weight if p.requires_grad else NF4 if id(p) in quantised else compute)
        if not p.requires_grad:
            continue
        at[1] += size
        largest = max(largest, size)
        for n, path in enumerate((f"{parts.vit}.blocks.", f"{parts.layers}.")):
            if (found := name.find(path)) >= 0:
                number = name[found + len(path) :].split(".", 1)[0]
                layer[n][number] = layer[n].get(number, 0) + size
    trained = sum(at[1] for at in numbers.values())
    first = min((int(number) for number in layer[0]), default=shape.vit_depth)
    return Static(
        parts=[PartSize(part, int(at[0]), int(at[1]), at[2]) for part, at in numbers.items() if at[0]],
        gradients=trained * gradient, states=trained * states, largest=largest * gradient,
        layer_gradients=tuple(gradient * max(each.values(), default=0) for each in layer),  # type: ignore[arg-type]
        learning=(shape.vit_depth - first, shape.layers), adapted=adapted_by(model, parts),
    )  # fmt: skip


_OF_ONE_INPUT = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "inner", "up_proj": "inner"}
"""Products that are run together, with one dropout (`vlft.models.kernels.product`)."""


def adapted_by(model: nn.Module, parts: Parts) -> tuple[float, float]:
    """What `Static.adapted` says.

    Adapters are so narrow that memory is their limit. With D columns of a group's input and O of its output, forward:
    A reads D, B writes O, and the base's product, which is added to that, reads O. Backward: O is read for the
    gradient between A and B and for B's, D for A's, and the input's gradient is written before the base's product
    is added to it. With dropout D is written once more, beside what is not dropped, and the kernel that ends in its
    backward pass takes as long as two further passes (bench/kernel_times.py).
    """
    groups: dict[tuple[str, str], list[Any]] = {}
    for name, module in model.named_modules():
        if getattr(module, "lora_A", None) and hasattr(module, "base_layer"):
            parent, _, own = name.rpartition(".")
            groups.setdefault((parent, _OF_ONE_INPUT.get(own, own)), []).append(module)
    found = [0.0, 0.0]
    for (parent, _), some in groups.items():
        drops = any(getattr(dropout, "p", 0.0) for module in some for dropout in module.lora_dropout.values())
        columns = some[0].base_layer.in_features * (7 if drops else 4)
        found[parts.vit not in parent] += columns + 4 * sum(module.base_layer.out_features for module in some)
    return found[0], found[1]


def towers_of(static: Static, shape: Shape, row: Row, compute: int, *, gradients: bool) -> list[Tower]:
    """`gradients`: those of layers come up in this row, and are not there from one before."""
    gated = len(shape.names.up)
    vision = Sizes(
        shape.vit_width, 3 * shape.vit_width, shape.vit_heads, shape.vit_width, gated * shape.vit_inner, False, False
    )  # fmt: skip
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = shape.names.first == "linear_fc1"  # Qwen3-VL normalises queries and keys
    language = Sizes(shape.width, wide + 2 * narrow, shape.heads, wide, 2 * shape.inner, norms, True)
    found = []
    for sizes, n, longest, layers, each in (
        (vision, row.patches, row.picture, static.learning[0], static.layer_gradients[0]),
        (language, row.tokens, row.sample, static.learning[1], static.layer_gradients[1]),
    ):
        found.append(Tower(layers, Cost.of(sizes, n, longest, compute), int(each) if gradients else 0))
    return found


def memory_of(
    static: Static,
    shape: Shape,
    row: Row,
    *,
    rows: int,
    compute: int,
    room: float,
    plan: str | int | MemoryPlan = "auto",
) -> Memory:
    """
    Args:
        row: the largest.
        rows: of a step: behind the first, gradients are there before the row.
        room: bytes of the GPU, for this process; layers keep what fits, unless `plan` says what they keep.
    """
    towers = towers_of(static, shape, row, compute, gradients=rows == 1)
    coming = sum(tower.layers * tower.gradients for tower in towers)
    pixels = row.patches * shape.patch_inputs * (compute + 1)
    positions = 8 * row.tokens * shape.head_dim + 8 * row.patches * shape.vit_width // shape.vit_heads
    features = 2 * row.work.merged * shape.width * compute * (1 + len(shape.levels))
    buffers = CONTEXT + pixels + positions + features
    logits = float(LOGITS * row.supervised * shape.vocabulary)
    before = static.weights + static.states + (static.gradients - coming) + static.largest + buffers
    free = room * (1 - MARGIN) - before  # what `--memory auto` leaves alone (`room_on_gpu`)
    if plan == "auto" or isinstance(plan, int):
        keeps = choose(towers, logits, free)
    else:
        keeps = fixed_by(plan, [t.layers for t in towers])
    again = sum(t.cost.again(keep) for t, each in zip(towers, keeps, strict=True) for keep in each)
    step = static.weights + static.states + static.gradients + CONTEXT
    whole = max(before + peak(towers, keeps, logits), step) * PIECES
    kept = sum(t.cost.kept(keep) for t, each in zip(towers, keeps, strict=True) for keep in each)
    return Memory(static.weights, static.gradients, static.states, kept, logits, buffers, whole,
                  (keeps[0], keeps[1]), again)  # fmt: skip
