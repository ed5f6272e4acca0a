"""Model FLOPs of one optimizer step: what the mathematics needs, not what the implementation does.

Counted are the matrix products of the model. Recomputation, padding, blank pictures, dequantisation, norms, activations
and rotary embeddings count nothing; causal attention counts the pairs that it keeps; the head runs on supervised tokens
only. One multiplication with its addition is two FLOPs, as in `torch.utils.flop_counter`, with which the tests agree to
the last FLOP. Backward: a product costs one more when its input needs a gradient and one more when its weight trains
(PaLM, Chowdhery et al. 2022, appendix B, counts in this way for a model that trains as a whole).

Everything is linear in `Work`, so a step costs one sum; what trains is read once from the prepared model:

    shape, training = describe(model, parts, config)
    work = Work.of(shape, lengths, image_grid_thw, supervised)   # of a row; rows and ranks add up
    flops = step_flops(shape, training, work)

T tokens, s tokens of a sample, S supervised tokens, I pictures of t x h x w patches, r rank of an adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, fields
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from vlft.errors import ModelError
from vlft.family import Parts

if TYPE_CHECKING:
    from torch import nn

Unit = Literal["tokens", "causal_pairs", "supervised", "patches", "frame_pairs", "window_pairs", "merged"]


@dataclass(frozen=True)
class Work:
    """What a row or a step consists of, as sums: those of rows and ranks add up (`+`, or all-reduce `astuple(work)`).

    A row that only keeps a rank company (one pad token, no sample) is `Work()`.
    """

    tokens: int = 0
    """T, image tokens included"""
    causal_pairs: int = 0
    """sum of s (s + 1) / 2: pairs of a token and one it attends to"""
    supervised: int = 0
    """S"""
    patches: int = 0
    """sum of t h w"""
    frame_pairs: int = 0
    """sum of t (h w)^2: pairs of patches where a ViT block attends within the whole frame"""
    window_pairs: int = 0
    """sum over windows of patches^2, those cut off at the frame's border as they are; 0 without windows"""
    merged: int = 0
    """image tokens"""

    @classmethod
    def of(cls, shape: Shape, lengths: npt.ArrayLike, grid_thw: npt.ArrayLike, supervised: int) -> Work:
        """The work of some samples.

        Args:
            lengths: (B,) tokens of each sample, image tokens included.
            grid_thw: (I, 3) patches of each picture, frames x height x width, on the CPU.
            supervised: tokens that are learnt.
        """
        s = np.asarray(lengths, dtype=np.int64)
        t, h, w = np.asarray(grid_thw, dtype=np.int64).reshape(-1, 3).T
        n, unit = t * h * w, shape.merge**2
        windows = t * _squares(h, shape) * _squares(w, shape) if shape.window else np.zeros(0, np.int64)
        return cls(
            tokens=int(s.sum()),
            causal_pairs=int((s * (s + 1) // 2).sum()),
            supervised=int(supervised),
            patches=int(n.sum()),
            frame_pairs=int((n * h * w).sum()),
            window_pairs=int(windows.sum()),
            merged=int((n // unit).sum()),
        )

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def _squares(side: npt.NDArray[np.int64], shape: Shape) -> npt.NDArray[np.int64]:
    """Sum over the windows along one side of (patches along it)^2. As transformers' `get_vision_window_index` cuts."""
    whole, rest = np.divmod(side // shape.merge, shape.window)
    squares: npt.NDArray[np.int64] = (whole * shape.window**2 + rest**2) * shape.merge**2
    return squares


@dataclass(frozen=True)
class _Names:
    """What a family calls the modules of its vision tower, relative to a block and to a merger."""

    up: tuple[str, ...]
    down: str
    norm: str
    first: str
    second: str


_SEQUENTIAL = ("ln_q", "mlp.0", "mlp.2")
_NAMES = {
    "qwen2_vl": _Names(("mlp.fc1",), "mlp.fc2", *_SEQUENTIAL),
    "qwen2_5_vl": _Names(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", *_SEQUENTIAL),
    "qwen3_vl": _Names(("mlp.linear_fc1",), "mlp.linear_fc2", "norm", "linear_fc1", "linear_fc2"),
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, from its Hugging Face config: those of the architecture, however weights are stored.

    D width, I inner width of an MLP, L layers, H heads, K key-value heads, d head size, V vocabulary; _v of the ViT.
    """

    names: _Names
    patch_inputs: int
    """numbers of a patch: channels x frames x side^2 (1176 for side 14, 1536 for side 16)"""
    vit_width: int
    """D_v"""
    vit_inner: int
    """I_v"""
    vit_depth: int
    """L_v"""
    vit_heads: int
    """H_v"""
    windowed: frozenset[int]
    """blocks of the ViT that attend within windows; the others attend within the frame"""
    window: int
    """side of a window in merged tokens; 0 without windows"""
    merge: int
    """side of a merged token in patches"""
    levels: tuple[int, ...]
    """blocks of the ViT whose output goes through a merger of its own into LLM layer 0, 1, ..."""
    width: int
    """D"""
    inner: int
    """I"""
    layers: int
    """L"""
    heads: int
    """H"""
    kv_heads: int
    """K"""
    head_dim: int
    """d"""
    vocabulary: int
    """V"""

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From the config of a whole model.

        Raises:
            ModelError: a family whose products are not known here.
        """
        if config.model_type not in _NAMES:
            raise ModelError(f"no FLOP count for models of type '{config.model_type}'; known: {', '.join(_NAMES)}.")
        text, vit = config.get_text_config(), config.vision_config
        # Qwen2-VL calls the tower's width embed_dim, and hidden_size what comes out of the merger.
        vit_width = int(getattr(vit, "embed_dim", None) or vit.hidden_size)
        full = getattr(vit, "fullatt_block_indexes", None)
        windowed = frozenset(range(vit.depth)) - frozenset(full) if full is not None else frozenset()
        merge = int(vit.spatial_merge_size)
        return cls(
            names=_NAMES[config.model_type],
            patch_inputs=int(vit.in_channels * vit.temporal_patch_size * vit.patch_size**2),
            vit_width=vit_width,
            vit_inner=int(getattr(vit, "intermediate_size", None) or vit_width * vit.mlp_ratio),
            vit_depth=int(vit.depth),
            vit_heads=int(vit.num_heads),
            windowed=windowed,
            window=vit.window_size // merge // vit.patch_size if windowed else 0,
            merge=merge,
            levels=tuple(getattr(vit, "deepstack_visual_indexes", None) or ()),
            width=int(text.hidden_size),
            inner=int(text.intermediate_size),
            layers=int(text.num_hidden_layers),
            heads=int(text.num_attention_heads),
            kv_heads=int(text.num_key_value_heads),
            head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads),
            vocabulary=int(text.vocab_size),
        )


@dataclass(frozen=True)
class Adapter:
    """One matrix beside the weight of a linear module, such as either half of LoRA (Hu et al. 2021)."""

    module: str
    elements: int
    """in x r or r x out"""
    inner: bool
    """Its input is another adapter's output, not the module's input."""
    trains: bool


@dataclass(frozen=True)
class Training:
    """What of a model trains. Modules go by short names: `vit.blocks.0.attn.qkv`, `layers.3.mlp.up_proj`, `head`.

    Nothing trains in `Training()`: then a step is a forward.
    """

    weights: frozenset[str] = frozenset()
    """Linear modules whose own weight trains."""
    carriers: frozenset[str] = frozenset()
    """Modules in which anything trains (weight, bias, adapter), so that what comes out of them needs a gradient."""
    adapters: tuple[Adapter, ...] = ()
    """Trained or not, in the order of the model. All count as active."""
    uncounted: tuple[str, ...] = ()
    """Trainable parameters of modules that this count does not know, such as a plugin's own: not counted."""

    @classmethod
    def of(cls, model: nn.Module, parts: Parts, shape: Shape) -> Training:
        """Read it off a prepared model's `requires_grad`, plain or wrapped, before or after the engine wraps it.

        DoRA (Liu et al. 2024) counts as LoRA: the norm of its merged weight does not depend on the batch.
        """
        known = _walk(shape, cls()).inputs
        weights, carriers, adapters, uncounted = set[str](), set[str](), list[Adapter](), list[str]()
        for name, p in model.named_parameters(remove_duplicate=False):  # a tied head is there by its own name
            module, rest = _owner(_short_name(name, parts), known)
            if not module:
                uncounted += [name] if p.requires_grad else []
                continue
            if p.requires_grad:
                carriers.add(module)
            if _is_base(rest):
                weights |= {module} if p.requires_grad else set()
                continue
            size = tuple(getattr(p, "ds_shape", p.shape))  # ZeRO-3 leaves an empty tensor in place of a weight
            if len(size) > 1 and not known[module]:
                uncounted += [name] if p.requires_grad else []
            elif len(size) > 1:
                inner = prod(size[1:]) != known[module] or "lora_B" in rest
                adapters.append(Adapter(module, prod(size), inner, p.requires_grad))
        return cls(frozenset(weights), frozenset(carriers), tuple(adapters), tuple(uncounted))


_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_SAVED = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")
"""PEFT's trained copy, of one module or of a whole tower."""


def _short_name(name: str, parts: Parts) -> str:
    """`base_model.model.model.visual.blocks.0.norm1.weight` -> `vit.blocks.0.norm1.weight`; "" outside all parts."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    name = _SAVED.sub("", name)
    projectors = zip(("merger", "levels"), parts.projector, strict=False)  # inside the ViT, hence before it
    rest = (("vit", parts.vit), ("layers", parts.layers), ("embed", parts.embed), ("norm", parts.norm))
    for short, path in (*projectors, *rest, ("head", parts.head)):
        _, found, after = f".{name}".partition(f".{path}.")
        if found:
            return f"{short}.{after}"
    return ""


def _owner(name: str, known: Mapping[str, int]) -> tuple[str, str]:
    """The module of the walk that a parameter belongs to and its name inside; ("", name) without one."""
    module = name
    while "." in module:
        module = module.rpartition(".")[0]
        if module in known:
            return module, name[len(module) + 1 :]
    return "", name


def _is_base(rest: str) -> bool:
    """The module's own weight, in place or inside PEFT's wrappers."""
    words = rest.split(".")
    return words[-1] == "weight" and words[0] in ("weight", "base_layer", "original_module", "modules_to_save")


class _Walk:
    """One walk through the model in the order of its forward: costs of products, and whose output needs a gradient.

    The methods take whether the input needs a gradient and return whether the output does.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self.flops: dict[Unit, int] = {}
        self.inputs: dict[str, int] = {}
        """Modules passed, with the length of a row of their input; 0 for those without a product."""
        self.adapters: dict[str, list[Adapter]] = {}
        for adapter in training.adapters:
            self.adapters.setdefault(adapter.module, []).append(adapter)

    def _add(self, unit: Unit, flops: int) -> None:
        self.flops[unit] = self.flops.get(unit, 0) + flops

    def through(self, name: str, needs: bool) -> bool:
        """Norms and embeddings."""
        self.inputs[name] = 0
        return needs or name in self.training.carriers

    def product(self, name: str, unit: Unit, inputs: int, outputs: int, needs: bool) -> bool:
        self.inputs[name] = inputs
        self._add(unit, 2 * inputs * outputs * (1 + needs + (name in self.training.weights)))
        adapters = self.adapters.get(name, [])
        low = needs or any(a.trains and not a.inner for a in adapters)
        for a in adapters:
            self._add(unit, 2 * a.elements * (1 + (low if a.inner else needs) + a.trains))
        return needs or name in self.training.carriers

    def attention(self, unit: Unit, width: int, q: bool, k: bool, v: bool) -> bool:
        """Two products of equal cost: queries by keys, weights by values.

        Backward costs two forwards where queries, keys and values all need a gradient.
        """
        self._add(unit, 2 * width * ((1 + q + k) + (1 + (q | k) + v)))
        return q | k | v

    def mlp(self, unit: Unit, up: tuple[str, ...], down: str, width: int, inner: int, needs: bool) -> bool:
        # `max`, not `any`, which would stop before the second product.
        return self.product(down, unit, inner, width, max(self.product(n, unit, width, inner, needs) for n in up))


def _vit(walk: _Walk, shape: Shape) -> Iterator[bool]:
    """Whether the output of each block needs a gradient."""
    width = shape.vit_width
    x = walk.product("vit.patch_embed.proj", "patches", shape.patch_inputs, width, False)
    x = walk.through("vit.pos_embed", x)  # of Qwen3-VL
    for i in range(shape.vit_depth):
        at = f"vit.blocks.{i}."
        qkv = walk.product(at + "attn.qkv", "patches", width, 3 * width, walk.through(at + "norm1", x))
        pairs: Unit = "window_pairs" if i in shape.windowed else "frame_pairs"
        attended = walk.attention(pairs, width, qkv, qkv, qkv)
        x |= walk.product(at + "attn.proj", "patches", width, width, attended)
        up = tuple(at + name for name in shape.names.up)
        x |= walk.mlp("patches", up, at + shape.names.down, width, shape.vit_inner, walk.through(at + "norm2", x))
        yield x


def _merger(walk: _Walk, shape: Shape, at: str, needs: bool) -> bool:
    wide = shape.merge**2 * shape.vit_width
    x = walk.through(f"{at}.{shape.names.norm}", needs)
    x = walk.product(f"{at}.{shape.names.first}", "merged", wide, wide, x)
    return walk.product(f"{at}.{shape.names.second}", "merged", wide, shape.width, x)


def _llm_layer(walk: _Walk, shape: Shape, i: int, x: bool) -> bool:
    at, width, wide, narrow = f"layers.{i}.", shape.width, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    y = walk.through(at + "input_layernorm", x)
    q, k, v = (
        walk.product(f"{at}self_attn.{name}_proj", "tokens", width, size, y)
        for name, size in (("q", wide), ("k", narrow), ("v", narrow))
    )
    q, k = (walk.through(f"{at}self_attn.{name}_norm", z) for name, z in (("q", q), ("k", k)))  # of Qwen3-VL
    attended = walk.attention("causal_pairs", wide, q, k, v)
    x |= walk.product(at + "self_attn.o_proj", "tokens", wide, width, attended)
    up = (at + "mlp.gate_proj", at + "mlp.up_proj")
    y = walk.through(at + "post_attention_layernorm", x)
    return x | walk.mlp("tokens", up, at + "mlp.down_proj", width, shape.inner, y)


def _walk(shape: Shape, training: Training) -> _Walk:
    walk = _Walk(training)
    blocks = list(_vit(walk, shape))
    levels = [_merger(walk, shape, f"levels.{n}", blocks[i]) for n, i in enumerate(shape.levels)]
    x = walk.through("embed", _merger(walk, shape, "merger", blocks[-1]))
    for i in range(shape.layers):
        x = _llm_layer(walk, shape, i, x)
        x |= i < len(levels) and levels[i]
    walk.product("head", "supervised", shape.width, shape.vocabulary, walk.through("norm", x))
    return walk


def describe(model: nn.Module, parts: Parts, config: Any) -> tuple[Shape, Training]:
    """Sizes and what trains, of a model that a strategy prepared and its Hugging Face config.

    Raises:
        ModelError: a family whose products are not known here.
    """
    shape = Shape.of(config)
    return shape, Training.of(model, parts, shape)


@lru_cache(maxsize=64)
def unit_flops(shape: Shape, training: Training) -> tuple[int, ...]:
    """FLOPs, forward and backward, that one of each unit of `Work` costs, in the order of its fields.

    Where the ViT or the projector trains, every token of LLM layer 0 counts as needing a gradient, also in a row of
    text alone: rows are packed together, and what a sample costs should not depend on its neighbours.
    """
    flops = _walk(shape, training).flops
    return tuple(flops.get(f.name, 0) for f in fields(Work))  # type: ignore[call-overload]


def step_flops(shape: Shape, training: Training, work: Work) -> int:
    """FLOPs of forward and backward over `work`: of all ranks, if it is the sum over all ranks. Exact, hence an int."""
    return sum(cost * amount for cost, amount in zip(unit_flops(shape, training), astuple(work), strict=True))
