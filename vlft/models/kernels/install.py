"""Find the layers of both towers and put the faster forward over their own.

`install` looks at what a module of transformers' Qwen-VL holds, not at which of its classes it is, so that one set of
rules serves Qwen2-VL, Qwen2.5-VL and Qwen3-VL. Modules keep their parameters and names; hooks of a layer run. A layer
that holds something unknown, or hooks on modules inside (`foreign.py`), keeps its own forward, and the summary at the
start of a run says how many and why. `settle` looks once more at the first forward, and whenever modules inside have
come or gone since (adapters); what is hooked inside a layer later than the first forward does not run. Generation goes
through caches and masks: it keeps transformers' forward too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlft.family import Parts
from vlft.models.attention import NAME
from vlft.models.kernels.block import Block, Call, compute_dtype, run
from vlft.models.kernels.foreign import check_activation, foreign, known, norm, own_forward, stale
from vlft.models.kernels.held import Held
from vlft.models.kernels.pointwise import Activation
from vlft.models.kernels.product import Product, Products, UnsupportedError
from vlft.optim import keep_remainder, master_dtype


@dataclass
class Installed:
    """What runs faster, and what does not and why."""

    vision: list[nn.Module] = field(default_factory=list)
    language: list[nn.Module] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)
    """reason -> layers that keep their own forward"""
    holds: bool = False
    """Joined weights are kept in the layers. Only where parameters stay whole and at their place (no sharding engine)
    and there is memory for them."""
    held: Held | None = None
    below: list[nn.Module] = field(default_factory=list)
    """What the language model's layers get their input from: the vision tower with its projector, the embedding."""

    def before_row(self, kind: torch.dtype, device: torch.device) -> None:
        """Bring what layers hold up to date with the parameters; `kind`: compute dtype."""
        if not self.holds:
            if self.held is not None:
                for block in self._blocks():
                    block.drop()
                self.held = None
            return
        if self.held is None or not self.held.of(kind):
            self.held = Held.make(self._blocks(), kind, device)
        self.held.refresh()

    def _blocks(self) -> list[Block]:
        return [layer.vlft_block for layer in self.layers]  # type: ignore[misc]

    def split_masters(self) -> None:
        """Have what trains of the products' own weights in bf16, as products take it, with a remainder beside it."""
        for p in {id(p): p for product in self._products() if product.plain for p in product.own()}.values():
            if p is not None and p.requires_grad and p.dtype == torch.float32:
                keep_remainder(p)

    def _products(self) -> Iterator[Product]:
        return (product for block in self._blocks() for group in block.groups() for product in group.each)

    def narrow_gradients(self, kind: torch.dtype | None) -> None:
        """Gradients of the products' own weights will be in `kind`, or in their masters' dtype. None is there now."""
        for product in self._products():
            weight = product.base.weight
            if product.plain and (weight.requires_grad or kind is None):  # it may have been frozen meanwhile
                weight.grad_dtype = kind or master_dtype(weight)

    @property
    def layers(self) -> list[nn.Module]:
        """All that use the weights of all modules inside: who gathers weights must gather theirs at once."""
        return [*self.vision, *self.language]

    def learning(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Layers through which a gradient flows, of either tower: those from the first on that trains; all of the
        language model's, where something below them does."""
        below = any(_trains(module) for module in self.below)
        return _from_the_first(self.vision), self.language if below else _from_the_first(self.language)

    def settle(self) -> list[nn.Module]:
        """Give layers their own forward back that something was put on since they were installed.

        Returns:
            These layers; `left` says why.
        """
        reasons = ((layer, foreign(layer) or stale(layer)) for layer in self.layers)
        late = {id(layer): layer for layer, reason in reasons if reason and self._leave(reason)}
        for layer in late.values():
            # What may have been put over the layer's forward stays: it calls the one that asks this.
            layer.__dict__["vlft_block"] = None
        self.vision = [layer for layer in self.vision if id(layer) not in late]
        self.language = [layer for layer in self.language if id(layer) not in late]
        if late:
            self.held = None  # it is of their parameters too
        return list(late.values())

    def _leave(self, reason: str) -> bool:
        self.left[reason] += 1
        return True

    @property
    def reads_rows(self) -> bool:
        """The last layer takes `read_S`."""
        return bool(self.language) and bool(self.language[-1].is_last)

    def __str__(self) -> str:
        said = f"{len(self.layers)} layers as one operation each"
        kept = "; ".join(f"{n} keep transformers' forward: {reason}" for reason, n in self.left.items())
        return f"{said}; {kept}" if kept else said


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _from_the_first(layers: list[nn.Module]) -> list[nn.Module]:
    """That trains."""
    trains = [_trains(layer) for layer in layers]
    return layers[trains.index(True) :] if True in trains else []


def install(model: nn.Module, parts: Parts) -> Installed:
    """Put the faster forwards over those of `model`, a plain Hugging Face model whose layers may be wrapped inside."""
    tower: Any = model.get_submodule(parts.vit)
    found = Installed(below=[tower, model.get_submodule(parts.embed)])
    for block in tower.blocks:
        if _install(block, _vision_pieces, _vision_forward, found):
            found.vision.append(block)
    if type(tower.patch_embed.proj) is nn.Conv3d and own_forward(tower.patch_embed.proj):
        _over(tower.patch_embed.proj, _patch_forward)
    layers: Any = model.get_submodule(parts.layers)
    for layer in layers:
        if _install(layer, _decoder_pieces, _decoder_forward, found):
            layer.is_last = layer is layers[-1]
            found.language.append(layer)
    return found


def blocks_of(model: nn.Module, parts: Parts) -> tuple[list[Block], list[Block]]:
    """Of the vision tower and of the language model, from what `install` would put its forwards over; the model, which
    may be without numbers, stays as it is."""
    tower: Any = model.get_submodule(parts.vit)
    layers: Any = model.get_submodule(parts.layers)
    return _blocks(tower.blocks, _vision_pieces), _blocks(layers, _decoder_pieces)


def _blocks(layers: Any, pieces: Callable[[Any], Block]) -> list[Block]:
    found = []
    for layer in layers:
        with suppress(UnsupportedError):
            found.append(pieces(layer))
    return found


def _install(layer: Any, pieces: Callable[[Any], Block], forward: Callable[..., Any], found: Installed) -> bool:
    if reason := foreign(layer):
        found.left[reason] += 1
        return False
    try:
        # Not as an attribute of the module: it holds modules, which would be registered twice.
        layer.__dict__["vlft_block"] = pieces(layer)
    except UnsupportedError as error:
        found.left[str(error)] += 1
        return False
    layer.keep = "all"
    _over(layer, forward)
    return True


def _over(module: Any, forward: Callable[..., Any]) -> None:
    """Make `forward(module, ...)` its forward; what was there stays in `plain_forward`."""
    if "plain_forward" in module.__dict__:
        return
    module.__dict__["plain_forward"] = module.forward
    module.forward = MethodType(forward, module)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces


def _activation(name: str, *, gated: bool) -> Activation:
    wanted = f"{name}_gated" if gated else name
    if wanted not in get_args(Activation):
        raise UnsupportedError(f"the activation {name}{' with gates' if gated else ''}")
    return wanted  # type: ignore[return-value]


def _mlp(mlp: Any, activation: str) -> tuple[Products, Activation, Products]:
    check_activation(mlp, activation)
    if hasattr(mlp, "gate_proj"):
        known(mlp, "up_proj", "down_proj")
        inner = Products([mlp.gate_proj, mlp.up_proj], fills_up=True)
        return inner, _activation(activation, gated=True), Products([mlp.down_proj], filled_up=True)
    names = ("fc1", "fc2") if hasattr(mlp, "fc1") else ("linear_fc1", "linear_fc2")
    first, second = (getattr(known(mlp, *names), name) for name in names)
    return Products([first], fills_up=True), _activation(activation, gated=False), Products([second], filled_up=True)


def _vision_pieces(block: Any) -> Block:
    known(block, "norm1", "attn", "norm2", "mlp")
    attn = known(block.attn, "config", "qkv", "proj", "num_heads", "head_dim", "scaling")
    inner, activation, down = _mlp(block.mlp, attn.config.hidden_act)
    heads = int(attn.num_heads)
    return Block(
        norm_1=norm(block.norm1), qkv=Products([attn.qkv]), q_norm=None, k_norm=None, out=Products([attn.proj]),
        norm_2=norm(block.norm2), inner=inner, activation=activation, down=down, heads=heads, kv_heads=heads,
        size=int(attn.head_dim), scale=float(attn.scaling), causal=False,
    )  # fmt: skip


def _decoder_pieces(layer: Any) -> Block:
    known(layer, "input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    attn = known(
        layer.self_attn, "config", "q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "attention_dropout"
    )  # fmt: skip
    if attn.attention_dropout or getattr(attn, "sliding_window", None):
        raise UnsupportedError("attention dropout or a sliding window")
    inner, activation, down = _mlp(layer.mlp, attn.config.hidden_act)
    size = int(attn.head_dim)
    norms = (norm(attn.q_norm), norm(attn.k_norm)) if hasattr(attn, "q_norm") else (None, None)
    qkv = Products([attn.q_proj, attn.k_proj, attn.v_proj])
    return Block(
        norm_1=norm(layer.input_layernorm), qkv=qkv, q_norm=norms[0], k_norm=norms[1], out=Products([attn.o_proj]),
        norm_2=norm(layer.post_attention_layernorm), inner=inner, activation=activation, down=down,
        heads=qkv.each[0].rows // size, kv_heads=qkv.each[1].rows // size, size=size, scale=float(attn.scaling),
        causal=True,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Forwards


def _call(
    layer: Any,
    x: Tensor,
    embeddings: tuple[Tensor, Tensor],
    borders: Tensor,
    longest: int | None,
    rows_S: Tensor | None = None,
) -> Call:
    cos, sin = (part.reshape(-1, part.shape[-1]) for part in embeddings)
    return Call(
        cos_Nd=cos, sin_Nd=sin, borders=borders, longest=longest, kind=compute_dtype(x), keep=layer.keep,
        seeds=layer.vlft_block.seeds(training=layer.training), rows_S=rows_S,
        learns=torch.is_grad_enabled(),
    )  # fmt: skip


def _vision_forward(
    self: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    max_seqlen: int | None = None,
    **kwargs: Any,
) -> Tensor:
    if self.vlft_block is None or self.attn.config._attn_implementation != NAME or position_embeddings is None:
        plain: Tensor = self.plain_forward(
            hidden_states, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, max_seqlen=max_seqlen,
            **kwargs,
        )  # fmt: skip
        return plain
    return run(
        self.vlft_block, hidden_states, _call(self, hidden_states, position_embeddings, cu_seqlens, max_seqlen)
    )  # fmt: skip


def _decoder_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    read_S: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """`read_S`: int64 places of the tokens that are read behind the last layer, which returns (1, S, D) then."""
    own = self.vlft_block is None or self.self_attn.config._attn_implementation != NAME
    if own or cu_seq_lens_q is None or position_embeddings is None:
        return self.plain_forward(
            hidden_states, position_embeddings=position_embeddings, cu_seq_lens_q=cu_seq_lens_q,
            max_length_q=max_length_q, **kwargs,
        )  # fmt: skip
    rows_S = read_S if self.is_last else None
    call = _call(self, hidden_states, position_embeddings, cu_seq_lens_q, max_length_q, rows_S)
    return run(self.vlft_block, hidden_states.flatten(0, 1), call).unsqueeze(0)


def _patch_forward(self: Any, patches: Tensor) -> Tensor:
    """The patch embedding's convolution has no overlap: it is one product (and cuDNN's is slow to disastrous)."""
    kind = compute_dtype(patches)
    bias = None if self.bias is None else self.bias.to(kind)
    with torch.autocast(patches.device.type, enabled=False):
        return F.linear(patches.flatten(1).to(kind), self.weight.flatten(1).to(kind), bias)
