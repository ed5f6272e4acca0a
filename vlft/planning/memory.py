"""Memory of a training on one GPU, by component, at its worst moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vlft.allocator import CONTEXT
from vlft.config import MemoryPlan
from vlft.family import PARTS, Part, Parts
from vlft.models.flops import Shape
from vlft.models.forward import base_model
from vlft.models.kernels.block import Keep
from vlft.models.kernels.install import blocks_of
from vlft.models.kernels.memory import MARGIN, MARGIN_WITHOUT_RETRY, Cost, Sizes, Tower, choose, fixed_by, peak
from vlft.models.load import is_quantised
from vlft.planning.load import Row
from vlft.proof import logical_size

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4 whose scales, one to 64 weights, are quantised again to 8 bits, 256 to a scale."""
PIECES = 1.02
"""What the allocator holds over what it gives out: by 2% more in the mean of 30 runs on an H200, from 0.7 to 5.9%
(docs/planning.md)."""


REFERENCE_LOGIT = 14
"""Bytes of a logit by PyTorch's own functions: in the compute dtype and in fp32, the log of its softmax, and the
gradients of these."""


@dataclass(frozen=True)
class PartSize:
    part: Part
    parameters: int
    trainable: int
    bytes: float
    """of weights, trained ones as the run keeps them"""
    quantised: int = 0
    """of the parameters, those of four bits"""


@dataclass(frozen=True)
class Copies:
    """What layers multiply with in the place of their parameters (`vlft.models.kernels.product`), and what takes them
    more work than plain weights."""

    held: float = 0.0
    """bytes of copies that are kept"""
    fresh: float = 0.0
    """bytes of the largest that is made for one product and dropped after it"""
    ranks: tuple[int, int] = (0, 0)
    """of all adapters of a layer, of the vision tower and of the language model"""
    adapted: int = 0
    """layers with adapters"""
    packed: int = 0
    """layers with 4-bit weights"""


@dataclass(frozen=True)
class Static:
    """What is there whatever a row holds."""

    parts: list[PartSize]
    gradients: float
    states: float
    ends: tuple[float, float]
    """gradients of the embedding and of the head, which come last and first in a backward pass; where they are one
    weight, its gradient comes twice"""
    tied: bool
    """The embedding is the head."""
    layer_gradients: tuple[list[float], list[float]]
    """of each layer of the vision tower and of the language model that learns, in the order of the forward"""
    product_gradients: tuple[list[float], list[float]]
    """of `layer_gradients`, those of the products' own weights"""
    copies: Copies
    copies_of_split: Copies
    """where masters are in two halves (`vlft.optim.remainder`)"""
    sharded: bool = False
    """by an engine, which has gradients ready from the start"""
    passing: float = 0.0
    """weights that it gathers and gradients that it sends while a row runs (`Engine.passing_bytes`)"""
    masters: bool = False
    """Trained weights are in fp32 where products are not."""
    is_split: bool = False
    """Of them, those of products are in two halves."""
    adapted: tuple[float, float] = (0.0, 0.0)
    """numbers that the adapters read and write for a patch and for a token, in all layers, forward and backward"""

    @property
    def learning(self) -> tuple[int, int]:
        """Layers of either through which a gradient flows."""
        return len(self.layer_gradients[0]), len(self.layer_gradients[1])

    @property
    def weights(self) -> float:
        return sum(part.bytes for part in self.parts)

    def scaled(self, by: float) -> Static:
        """With gradients so much as large."""
        vision, language = ([size * by for size in each] for each in self.layer_gradients)
        ends = (self.ends[0] * by, self.ends[1] * by)
        return replace(self, gradients=self.gradients * by, ends=ends, layer_gradients=(vision, language))

    def split(self) -> Static:
        """With masters in two halves, as whole copies have them (`PackedVLM.split_masters`)."""
        return replace(self, copies=self.copies_of_split, is_split=True)

    def narrowed(self) -> Static:
        """With these in bf16, as a step of one row has them (`PackedVLM.narrow_gradients`)."""
        pairs = zip(self.layer_gradients, self.product_gradients, strict=True)
        vision, language = ([all_ - some / 2 for all_, some in zip(*pair, strict=True)] for pair in pairs)
        gradients = self.gradients - sum(map(sum, self.product_gradients)) / 2
        return replace(self, gradients=gradients, layer_gradients=(vision, language))


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    weights: float
    gradients: float
    states: float
    kept: float
    """by the layers, for the backward pass"""
    logits: float
    copies: float
    """of weights, that layers hold"""
    buffers: float
    """pixels, position tables, the context"""
    peak: float
    """At the worst moment: less than the sum, where gradients come as kept values go."""
    keeps: tuple[list[Keep], list[Keep]]
    again: float
    """FLOPs of one row that are done a second time"""
    holds: bool
    """Layers hold copies of parameters; otherwise they are made anew for each product."""


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
    numbers: dict[Part, list[float]] = {part: [0, 0, 0.0, 0] for part in PARTS}
    layer, products = ([[0.0] * shape.vit_depth, [0.0] * shape.layers] for _ in range(2))
    ends = [0.0, 0.0]
    for name, p in model.named_parameters():
        at = numbers[parts.part_of(name, tied_head=tied)]
        size = logical_size(p)
        at[0] += size
        at[2] += size * (weight if p.requires_grad else NF4 if id(p) in quantised else compute)
        at[3] += size * (id(p) in quantised)
        if not p.requires_grad:
            continue
        at[1] += size
        for n, path in enumerate((f"{parts.vit}.blocks.", f"{parts.layers}.")):
            if (found := name.find(path)) >= 0:
                at_layer = int(name[found + len(path) :].split(".", 1)[0])
                layer[n][at_layer] += size * gradient
                products[n][at_layer] += size * gradient * (p.ndim == 2 and "lora_" not in name)
        for n, path in enumerate((f"{parts.embed}.", f"{parts.head}.")):
            if path in name:
                ends[n] += size * gradient
    trained = sum(at[1] for at in numbers.values())
    first, first_text = (next((n for n, size in enumerate(each) if size), len(each)) for each in layer)
    if numbers["vit"][1] or numbers["projector"][1] or ends[0]:  # the gradient flows through all of the language model
        first_text = 0
    return Static(
        parts=[PartSize(part, int(at[0]), int(at[1]), at[2], int(at[3])) for part, at in numbers.items() if at[0]],
        gradients=trained * gradient, states=trained * states, ends=(ends[0], ends[0] if tied else ends[1]), tied=tied,
        layer_gradients=(layer[0][first:], layer[1][first_text:]),
        copies=copies_of(model, parts, masters=weight == 4, compute=compute),
        copies_of_split=copies_of(model, parts, masters=weight == 4, compute=compute, split=True),
        adapted=adapted_by(model, parts), masters=weight == 4 and compute < 4,
        product_gradients=(products[0][first:], products[1][first_text:]),
    )  # fmt: skip


def copies_of(model: nn.Module, parts: Parts, *, masters: bool, compute: int, split: bool = False) -> Copies:
    """
    Args:
        masters: what trains is in fp32, whatever it is in here.
        split: of products, in two halves: copies are made of their own weights only where these are joined or filled
            up. (Adapters are always copied.)
    """
    kind, gpu = torch.float32 if compute == 4 else torch.bfloat16, torch.device("cuda")

    def of(p: nn.Parameter) -> torch.dtype:
        return torch.float32 if p.requires_grad and masters and not split else kind

    towers = blocks_of(base_model(model), parts)
    blocks = [block for tower in towers for block in tower]
    bytes_ = [group.copied(kind, gpu, of) for block in blocks for group in block.groups()]
    vision, language = (max((Sizes.of(block).ranks for block in tower), default=0) for tower in towers)
    return Copies(
        held=sum(held for held, _ in bytes_), fresh=max((fresh for _, fresh in bytes_), default=0),
        ranks=(vision, language), adapted=sum(Sizes.of(block).ranks > 0 for block in blocks),
        packed=sum(any(not p.plain for group in block.groups() for p in group.each) for block in blocks),
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
    """As training sees them (`vlft.models.kernels.memory.Memory.before_row`).

    Args:
        gradients: those of layers come up in this row, and are not there from one before.
    """
    gated = len(shape.names.up)
    vision = Sizes(
        shape.vit_width, 3 * shape.vit_width, shape.vit_heads, shape.vit_width, gated * shape.vit_inner, False, False,
        static.copies.ranks[0],
    )  # fmt: skip
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = shape.names.first == "linear_fc1"  # Qwen3-VL normalises queries and keys
    language = Sizes(
        shape.width, wide + 2 * narrow, shape.heads, wide, 2 * shape.inner, norms, True, static.copies.ranks[1]
    )  # fmt: skip
    found = []
    for sizes, n, longest, layers in (
        (vision, row.patches, row.picture, static.layer_gradients[0]),
        (language, row.tokens, row.sample, static.layer_gradients[1]),
    ):
        each = tuple(int(size) if gradients else 0 for size in layers)
        found.append(Tower(Cost.of(sizes, n, longest, compute), each))
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
    reference: bool = False,
) -> Memory:
    """
    Args:
        row: the largest.
        rows: of a step: behind the first, gradients are there before the row.
        room: bytes of the GPU, for this process; layers keep what fits, unless `plan` says what they keep.
        reference: the loss is PyTorch's own.
    """
    come = rows == 1 and not static.sharded
    towers = towers_of(static, shape, row, compute, gradients=come)
    pixels = row.patches * shape.patch_inputs * (compute + 1)
    positions = 8 * row.tokens * shape.head_dim + 8 * row.patches * shape.vit_width // shape.vit_heads
    features = 2 * row.work.merged * shape.width * compute * (1 + len(shape.levels))
    logits = float((REFERENCE_LOGIT if reference else compute) * row.supervised * shape.vocabulary)
    holds = plan != "low" and not static.sharded
    copies = static.copies.held if holds else 0.0
    still = static.weights + static.states + copies + static.passing
    if plan == "auto" or isinstance(plan, int):
        # As a row of training reckons: `auto` leaves a margin alone (`room_on_gpu`), and its pixels are there already.
        coming = sum(sum(tower.gradients) for tower in towers)
        margin = MARGIN_WITHOUT_RETRY if static.sharded else MARGIN
        free = room * (1 - margin) - CONTEXT - still - pixels - (static.gradients - coming)
        keeps = choose(towers, logits + 2 * _cast(static, shape, compute), free)
    else:
        keeps = fixed_by(plan, [t.layers for t in towers])
    again = sum(t.cost.again(keep) for t, each in zip(towers, keeps, strict=True) for keep in each)
    kept = sum(t.cost.kept(keep) for t, each in zip(towers, keeps, strict=True) for keep in each)
    inputs = pixels + positions + features
    given = still + inputs + _worst(static, towers, keeps, kept, logits, _cast(static, shape, compute), come=come)
    buffers = CONTEXT + inputs + static.passing
    return Memory(static.weights, static.gradients, static.states, kept, logits, copies, buffers,
                  CONTEXT + given * PIECES, (keeps[0], keeps[1]), again, holds)  # fmt: skip


def _cast(static: Static, shape: Shape, compute: int) -> float:
    """Bytes of the head in the compute dtype beside its master, and of its gradient beside that of the master."""
    cast = float(compute * shape.vocabulary * shape.width)
    return cast if static.ends[1] > cast else 0.0


def _worst(
    static: Static,
    towers: Sequence[Tower],
    keeps: Sequence[Sequence[Keep]],
    kept: float,
    logits: float,
    cast: float,
    *,
    come: bool,
) -> float:
    """Bytes of gradients and of what a row keeps, at the worst of three moments: at the head, in a layer's backward,
    and at its end, when the embedding's gradient comes.

    Args:
        come: gradients are not there before.
    """
    embedding, head = static.ends
    there = static.gradients
    if come:
        there -= sum(map(sum, static.layer_gradients)) + (head if static.tied else head + embedding)
    at_head = there + kept + cast + logits + head + cast
    if come:
        there += head
    twice = 0.0 if come else max((max(each, default=0.0) for each in static.layer_gradients), default=0.0)
    at_layers = there + peak(towers, keeps, 0.0) + twice + static.copies.fresh
    at_end = static.gradients + (embedding if static.tied or not come else 0.0)
    return max(at_head, at_layers, at_end)
