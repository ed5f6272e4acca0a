"""The count against `torch.utils.flop_counter`, to the last FLOP, and against the closed formulas at real sizes.

Two things that the counter sees and the count leaves out are added in `counted`, exactly, from the same `Work`:

* The counter does not know causal attention: it counts s^2 pairs of a sample where the count has s (s + 1) / 2. The
  kernels of the CPU are not known to it at all, so attention runs as plain products here (`SDPBackend.MATH`).
* A row without a picture runs the vision tower on a blank of 2 x 2 patches, so that every rank calls every module.
  The count has no such picture.

The rotary embedding of the LLM is a product in some versions of transformers (position by frequency: d / 2
multiplications a token); what the counter finds inside `rotary_emb` is taken off its total. bitsandbytes' product with
a 4-bit weight is an operator of its own: the counter is told its size. Nothing else is corrected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import vision_utils

from vlft.data.plan import place
from vlft.data.sample import Costs
from vlft.errors import ModelError
from vlft.family import FAMILIES as ROWS
from vlft.models.flops import Shape, Training, Work, describe, step_flops, unit_flops
from vlft.models.forward import IGNORE, PackedVLM, base_model
from vlft.models.load import open_checkpoint, source_of
from vlft.setup import ATTENTION, costs_of
from vlft.testing.tiny import FAMILIES, make_config, make_tokenizer
from vlft_strategies.full import Full
from vlft_strategies.lora import Lora, LoraLlmFullVit
from vlft_strategies.partial import PartialLlmFullVit
from vlft_strategies.vit_only import VitOnly

Grids = list[tuple[int, int, int]]
# Per sample: pictures. Sides of 2, 6 and 10 patches leave windows (4 patches in the tiny model) cut off at the border.
ROWS_OF_SAMPLES: dict[str, list[Grids]] = {
    "one picture": [[(1, 4, 6)]],
    "several": [[(1, 10, 6)], [], [(1, 2, 4), (1, 8, 10), (2, 6, 2)], [(1, 12, 14)]],
    "text": [[], [], []],
}
FEW = {"lora_rank": 4, "lora_target_modules": ("q_proj", "down_proj"), "lora_dropout": 0.0}
PREPARED: dict[str, tuple[Any, dict[str, Any]]] = {
    "all": (Full, {}),
    "frozen ViT": (Full, {"train_vit": False}),
    "frozen ViT and projector": (Full, {"train_vit": False, "train_projector": False}),
    "ViT and projector": (VitOnly, {}),
    "ViT alone": (VitOnly, {"train_projector": False}),
    "projector alone": (Full, {"train_vit": False, "train_llm": False}),
    "upper layers": (PartialLlmFullVit, {"llm_frozen_layers": 2}),
    "upper layers, frozen ViT": (PartialLlmFullVit, {"train_vit": False, "train_projector": False}),
    "head and norm": (PartialLlmFullVit, {"llm_frozen_layers": 3, "train_vit": False, "train_projector": False}),
    "adapters, ViT": (LoraLlmFullVit, {"lora_rank": 8}),
    "adapters, frozen ViT": (Lora, {"lora_rank": 8}),
    "adapters as wide as the model": (Lora, {"lora_rank": 64}),
    "few adapters": (Lora, FEW),
    "few adapters, projector": (Lora, FEW | {"train_projector": True}),
}


def prepare(folder: Path, strategy: Any, options: dict[str, Any]) -> tuple[Any, nn.Module]:
    source = source_of(open_checkpoint(str(folder)), "no", torch.device("cpu"))
    return source, strategy(strategy.Config(**options)).prepare_model(source)


def a_row(source: Any, samples: list[Grids]) -> tuple[dict[str, Any], list[int], Grids, int]:
    """Arguments of `PackedVLM`, and lengths, grids and supervised tokens."""
    ids, lengths = list[int](), list[int]()
    for n, grids in enumerate(samples):
        sample = [20 + n] * (7 + 3 * n)
        for t, h, w in grids:
            sample += [9, *[source.config.image_token_id] * (t * h * w // 4), 10]
        ids += sample
        lengths.append(len(sample))
    labels = torch.full((1, len(ids)), IGNORE)
    labels[0, 2::3] = 5
    all_grids = [g for grids in samples for g in grids]
    vision = source.config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    row = {
        "input_ids_T": torch.tensor([ids]),
        "position_ids_4T": torch.arange(len(ids)).expand(4, 1, -1),
        "labels_T": labels,
        "cu_seqlens": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        "max_seqlen": max(lengths),
        "pixel_values": torch.randn(sum(t * h * w for t, h, w in all_grids), width) if all_grids else None,
        "image_grid_thw": torch.tensor(all_grids, dtype=torch.int64).reshape(-1, 3),
    }
    return row, lengths, all_grids, int((labels != IGNORE).sum())


def four_bit() -> dict[Any, Any]:
    """FLOPs of bitsandbytes' product of x (..., in) with a packed weight whose logical shape is (out, in)."""

    def flops(x: torch.Size, packed: torch.Size, logical: list[int], *_: Any, **__: Any) -> int:
        return 2 * x.numel() * logical[0]

    product = getattr(torch.ops.bitsandbytes, "gemm_4bit", None)
    return {} if product is None else {product: flops}


def counter_of(packed: nn.Module, row: dict[str, Any]) -> int:
    """Forward and backward by the counter, the rotary embedding of the LLM taken off."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=four_bit()) as counter:
        losses = packed(**row)
        if losses.requires_grad:
            losses.sum().backward()
    modules = counter.get_flop_counts()
    rotary = [name for name in modules if name.endswith("language_model.rotary_emb")]
    return counter.get_total_flops() - sum(sum(modules[name].values()) for name in rotary)


def counted(shape: Shape, training: Training, lengths: list[int], grids: Grids, supervised: int) -> int:
    """The count, with what only the counter sees (see the top)."""
    work = Work.of(shape, lengths, grids, supervised)
    if not grids:
        work += Work.of(shape, [], [(1, 2, 2)], 0)
    return step_flops(shape, training, replace(work, causal_pairs=sum(s * s for s in lengths)))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", PREPARED)
@pytest.mark.parametrize("samples", ROWS_OF_SAMPLES)
def test_equals_the_counter(tiny: Callable[..., Path], family: str, what: str, samples: str) -> None:
    source, model = prepare(tiny(family), *PREPARED[what])
    row, lengths, grids, supervised = a_row(source, ROWS_OF_SAMPLES[samples])
    shape, training = describe(model, source.parts, source.config)
    packed = PackedVLM(model, source.parts, source.config.image_token_id, reference=True).train()
    assert training.uncounted == ()
    assert counted(shape, training, lengths, grids, supervised) == counter_of(packed, row)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "trains",
    [
        "layers.1.self_attn.k_proj.bias layers.2.mlp.up_proj.weight".split(),
        ["layers.0.post_attention_layernorm.weight"],
        ["visual.blocks.1.attn.proj.weight"],
        ["visual.blocks.2.norm1.bias", "visual.blocks.2.norm1.weight", "layers.2.self_attn.v_proj.weight"],
        ["visual.patch_embed.proj.weight"],
        ["visual.deepstack_merger_list.1.linear_fc1.weight", "language_model.norm.weight"],
        ["embed_tokens.weight"],
        ["layers.1.self_attn.q_norm.weight"],
        ["layers.1.post_attention_layernorm.weight"],
        ["visual.merger.norm.weight", "visual.merger.ln_q.weight"],
        ["lm_head.weight"],
        ["pos_embed.weight", "lm_head.weight"],
    ],
    ids=lambda names: names[0],
)
def test_any_choice_of_parameters(tiny: Callable[..., Path], family: str, trains: list[str]) -> None:
    """Strategies may train what they like: a bias alone, one matrix of a layer, a deepstack merger."""
    source, model = prepare(tiny(family), Full, {})
    for name, p in model.named_parameters():
        p.requires_grad_(any(name.endswith(end) for end in trains))
    if not any(p.requires_grad for p in model.parameters()):
        pytest.skip("this family has no such parameter")
    row, lengths, grids, supervised = a_row(source, ROWS_OF_SAMPLES["several"])
    shape, training = describe(model, source.parts, source.config)
    packed = PackedVLM(model, source.parts, source.config.image_token_id, reference=True)
    assert counted(shape, training, lengths, grids, supervised) == counter_of(packed, row)


def test_a_tied_head_trains_with_the_embeddings(tiny: Callable[..., Path]) -> None:
    source, model = prepare(tiny(tie=True), Full, {})
    row, lengths, grids, supervised = a_row(source, ROWS_OF_SAMPLES["one picture"])
    shape, training = describe(model, source.parts, source.config)
    assert "head" in training.weights
    packed = PackedVLM(model, source.parts, source.config.image_token_id, reference=True)
    assert counted(shape, training, lengths, grids, supervised) == counter_of(packed, row)


def test_names_of_wrapped_models(tiny: Callable[..., Path]) -> None:
    """The same before and after a wrapper, a compiler or DDP prefixes names."""
    source, model = prepare(tiny(), LoraLlmFullVit, {"lora_rank": 8})
    shape, training = describe(model, source.parts, source.config)
    packed: nn.Module = PackedVLM(model, source.parts, source.config.image_token_id, reference=True)
    layers = base_model(model).get_submodule(source.parts.layers)
    assert isinstance(layers, nn.ModuleList)
    layers[0] = torch.compile(layers[0])  # type: ignore[assignment]  # only wraps; nothing is compiled
    wrapped = nn.ModuleDict({"module": packed})
    assert Training.of(wrapped, source.parts, shape) == training


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train_vit", [False, True])
def test_a_quantised_model_counts_as_its_logical_sizes(tiny: Callable[..., Path], family: str, train_vit: bool) -> None:
    """Packed weights have other shapes; the same adapters on whole weights count the same."""
    pytest.importorskip("bitsandbytes")
    from vlft_strategies.qlora import QLora

    options = {"lora_rank": 8, "train_vit": train_vit}
    source, model = prepare(tiny(family), QLora, options)
    _, whole = prepare(tiny(family), Lora, options)
    shape, training = describe(model, source.parts, source.config)
    assert (shape, training) == describe(whole, source.parts, source.config)
    row, lengths, grids, supervised = a_row(source, ROWS_OF_SAMPLES["several"])
    packed = PackedVLM(model, source.parts, source.config.image_token_id, reference=True).train()
    assert counted(shape, training, lengths, grids, supervised) == counter_of(packed, row)


def test_what_dora_adds_does_not_depend_on_the_batch(tiny: Callable[..., Path]) -> None:
    """The norm of the merged weight, once a step: B (A 1) by products that PEFT runs and the count leaves out."""
    import peft

    source, plain = prepare(tiny(), Full, {})
    config = peft.LoraConfig(r=4, target_modules=r".*language_model\.layers.*proj", use_dora=True)
    model = peft.get_peft_model(plain, config)
    shape, training = describe(model, source.parts, source.config)
    packed = PackedVLM(model, source.parts, source.config.image_token_id, reference=True)
    more = set()
    for samples in ROWS_OF_SAMPLES.values():
        row, lengths, grids, supervised = a_row(source, samples)
        more.add(counter_of(packed, row) - counted(shape, training, lengths, grids, supervised))
    assert len(more) == 1


def test_modules_to_save_train_their_copy(tiny: Callable[..., Path]) -> None:
    import peft

    source, plain = prepare(tiny(), Full, {})
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head"])
    model = peft.get_peft_model(plain, config)
    _, training = describe(model, source.parts, source.config)
    assert training.weights == {"head"}
    assert "layers.0.self_attn.q_proj" in training.carriers
    # DoRA's magnitudes are vectors: no products.
    assert [a.elements for a in training.adapters if a.module == "layers.1.self_attn.q_proj"] == [4 * 64, 4 * 64]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_tower_in_modules_to_save(tiny: Callable[..., Path], family: str) -> None:
    """PEFT keeps the frozen tower beside the trained copy; the copy alone runs."""
    import peft

    source, plain = prepare(tiny(family), Full, {})
    config = peft.LoraConfig(r=4, target_modules=r".*language_model\.layers.*proj", modules_to_save=["visual"])
    model = peft.get_peft_model(plain, config)
    _, training = describe(model, source.parts, source.config)
    assert training.uncounted == ()
    same = prepare(tiny(family), LoraLlmFullVit, {"lora_rank": 4})[1]
    assert training.weights == describe(same, source.parts, source.config)[1].weights
    assert training.carriers == describe(same, source.parts, source.config)[1].carriers


def test_a_plugins_own_modules_are_named(tiny: Callable[..., Path]) -> None:
    source, model = prepare(tiny(), Lora, {"lora_rank": 8})
    base_model(model).get_submodule(source.parts.layers)[0].register_module("extra", nn.Linear(64, 3))  # type: ignore[index]
    _, training = describe(model, source.parts, source.config)
    assert [name.rpartition("extra.")[2] for name in training.uncounted] == ["weight", "bias"]


def test_nothing_trains_is_a_forward(tiny: Callable[..., Path]) -> None:
    source, model = prepare(tiny(), Full, {})
    row, lengths, grids, supervised = a_row(source, ROWS_OF_SAMPLES["several"])
    packed = PackedVLM(model.requires_grad_(False), source.parts, source.config.image_token_id, reference=True)
    assert counted(Shape.of(source.config), Training(), lengths, grids, supervised) == counter_of(packed, row)


def sums_of(shape: Shape, lengths: list[int], grids: Grids, supervised: int, rank: int) -> dict[str, int]:
    """The letters of the closed formulas, written out a second time: sample by sample, window by window."""
    dv, width, layers = shape.vit_width, shape.width, shape.layers
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    n, tokens, matrices = sum(t * h * w for t, h, w in grids), sum(lengths), 1 + len(shape.names.up)
    _, cu = vision_utils.get_vision_window_index(torch.tensor(grids), 2, 112, 14)
    windows = sum(int(x) ** 2 for x in cu.diff())
    frames = sum(t * (h * w) ** 2 for t, h, w in grids)
    cut = len(shape.windowed)
    linear = [(width, wide), (width, narrow), (width, narrow), (wide, width)]
    linear += [(width, shape.inner), (width, shape.inner), (shape.inner, width)]
    mergers = 1 + len(shape.levels)
    return {
        "E": 2 * n * shape.patch_inputs * dv,
        "B": 2 * n * shape.vit_depth * (4 * dv**2 + matrices * dv * shape.vit_inner),
        "Av": 4 * dv * ((shape.vit_depth - cut) * frames + cut * windows),
        "M": 2 * (n // 4) * ((4 * dv) ** 2 + 4 * dv * width) * mergers,
        "G": 2 * tokens * layers * sum(a * b for a, b in linear),
        "A": 4 * wide * layers * sum(i for s in lengths for i in range(1, s + 1)),
        "U": 2 * supervised * width * shape.vocabulary,
        "R": 2 * tokens * layers * rank * sum(a + b for a, b in linear),
        "first": 2 * tokens * (width * (wide + 2 * narrow) + 3 * rank * width),
    }


def real_config(family: str) -> Any:
    """Qwen2.5-VL-3B, Qwen2-VL-7B, Qwen3-VL-8B."""
    config = make_config(family, make_tokenizer(family))
    texts: dict[str, dict[str, int]] = {
        "qwen2_5_vl": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16),
        "qwen2_vl": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28),
        "qwen3_vl": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32),
    }
    visions: dict[str, dict[str, Any]] = {
        "qwen2_5_vl": dict(depth=32, hidden_size=1280, intermediate_size=3420, window_size=112)
        | {"fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": 2048},
        "qwen2_vl": dict(depth=32, embed_dim=1280, mlp_ratio=4, hidden_size=3584),
        "qwen3_vl": dict(depth=27, hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24]),
    }
    config.text_config.update(texts[family] | {"num_key_value_heads": 8, "vocab_size": 151936})
    if family == "qwen3_vl":
        config.text_config.head_dim = 128
    config.vision_config.update(visions[family])
    return config


def module_names(shape: Shape, *starts: str) -> frozenset[str]:
    """Every module of the walk that begins so."""
    from vlft.models.flops import _walk

    return frozenset(name for name in _walk(shape, Training()).inputs if name.startswith(starts))


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_closed_formulas_at_real_sizes(family: str) -> None:
    """Full, frozen ViT, adapters with ViT, adapters alone: by hand-made `Training`, no model needed."""
    from vlft.models.flops import Adapter, _walk

    shape = Shape.of(real_config(family))
    grids: Grids = [(1, 46, 34), (1, 32, 32), (1, 64, 114), (1, 74, 54), (2, 10, 6)]
    lengths, supervised, rank = [900, 431, 2049, 1200, 77, 33], 411, 64
    x = sums_of(shape, lengths, grids, supervised, rank)
    tower = module_names(shape, "vit", "merger", "levels")
    llm = module_names(shape, "layers", "norm", "head", "embed")
    inputs = _walk(shape, Training()).inputs
    linear = [m for m in inputs if m.startswith("layers") and inputs[m]]
    outs = {"q": shape.heads * shape.head_dim, "k": shape.kv_heads * shape.head_dim, "g": shape.inner}
    outs |= {"v": outs["k"], "u": shape.inner}
    halves = tuple(
        Adapter(m, rank * size, inner, True)
        for m in linear
        for inner, size in ((False, inputs[m]), (True, outs.get(m.rpartition(".")[2][0], shape.width)))
    )
    work = Work.of(shape, lengths, grids, supervised)

    def found(weights: frozenset[str], adapters: tuple[Adapter, ...] = ()) -> int:
        carriers = weights | {a.module for a in adapters}
        return step_flops(shape, Training(weights, carriers, adapters), work)

    vit, text = x["B"] + x["Av"] + x["M"], x["G"] + x["A"] + x["U"]
    adapted = 2 * x["G"] + 3 * x["A"] + 2 * x["U"] + 3 * x["R"]
    assert found(tower | llm) == 2 * x["E"] + 3 * vit + 3 * text
    frozen = x["E"] + x["B"] + x["Av"]
    assert found(module_names(shape, "merger", "levels") | llm) == frozen + 3 * x["M"] + 3 * text
    assert found(tower, halves) == 2 * x["E"] + 3 * vit + adapted
    # "less layer 0's q, k, v input gradients": of the frozen weights and of the adapters beside them.
    assert found(frozenset(), halves) == x["E"] + vit + adapted - x["first"]
    assert found(tower) == 2 * x["E"] + 3 * vit + 2 * x["G"] + 3 * x["A"] + 2 * x["U"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trains", ["all", "language model", "tower", "projector", "adapters, tower", "adapters"])
def test_ranks_do_the_same_work(family: str, trains: str) -> None:
    """Steps of texts, of small pictures and of pages, dealt out by what they cost as the model trains."""
    shape = Shape.of(real_config(family))
    projector = module_names(shape, "merger", "levels")
    tower = module_names(shape, "vit") | projector
    llm = module_names(shape, "layers", "norm", "head", "embed")
    # Adapters of no size: what they cost themselves is a hundredth.
    training = {
        "all": Training(tower | llm, tower | llm), "language model": Training(llm, llm),
        "tower": Training(tower, tower), "projector": Training(projector, projector),
        "adapters, tower": Training(tower, tower | llm), "adapters": Training(frozenset(), llm),
    }[trains]  # fmt: skip

    def takes(lengths: Any, learnt: Any, sides: Any) -> float:
        work = Work.of(shape, lengths, [(1, side, side) for side in sides.tolist() if side], int(learnt.sum()))
        pairs = Work(causal_pairs=work.causal_pairs, frame_pairs=work.frame_pairs, window_pairs=work.window_pairs)
        return step_flops(shape, training, work) + (ATTENTION - 1) * step_flops(shape, training, pairs)

    costs = costs_of((shape, training), [])
    rng = np.random.default_rng(0)
    worst = []
    for _ in range(20):
        sides = 2 * rng.integers(8, 34, 32) * (rng.random(32) < 0.6)
        text = rng.integers(40, 1600, 32)
        learnt = (text * rng.choice([0.05, 0.3, 0.9], 32)).astype(np.int64)
        lengths = sides**2 // 4 + text
        cost = costs.of(lengths, learnt, sides**2, sides**4)
        loads = [
            takes(lengths[row], learnt[row], sides[row]) for (row,) in place(lengths, sides**2, cost, ranks=4)
        ]  # fmt: skip
        worst.append(max(loads) / np.mean(loads))
        # What a window's border cuts off is counted as if it were there; of whole windows the cost is exact.
        whole = sides // 8 * 8
        exact = [takes(lengths[i : i + 1], learnt[i : i + 1], whole[i : i + 1]) for i in range(32)]
        assert costs.of(lengths, learnt, whole**2, whole**4) == pytest.approx(exact, rel=1e-9)
    assert np.mean(worst) < 1.006


def test_layers_that_no_formula_knows_cost_their_parameters() -> None:
    rows = [SimpleNamespace(part="llm", parameters=300), SimpleNamespace(part="vit", parameters=60)]
    assert costs_of(None, rows) == Costs(token=300, patch=60)


def test_a_picture_worked_out_by_hand() -> None:
    """Qwen2.5-VL-3B, one picture of 1288 x 952 pixels and 100 tokens of text."""
    config = real_config("qwen2_5_vl")
    config.text_config.num_key_value_heads = 2
    shape = Shape.of(config)
    work = Work.of(shape, [1564 + 100], [(1, 68, 92)], 80)
    assert astuple(work) == (1664, 1664 * 1665 // 2, 80, 6256, 6256**2, (8 * 64 + 16) * (11 * 64 + 16), 1564)
    cost = Work(*unit_flops(shape, Training()))
    assert cost.causal_pairs == 4 * 16 * 128 * 36
    assert (cost.frame_pairs, cost.window_pairs) == (4 * 1280 * 4, 4 * 1280 * 28)
    assert cost.patches == 2 * 1176 * 1280 + 2 * 32 * (4 * 1280**2 + 3 * 1280 * 3420)


@pytest.mark.parametrize(("window", "merge", "patch"), [(112, 2, 14), (56, 2, 14), (120, 2, 14), (64, 2, 16)])
def test_windows_are_cut_as_transformers_cuts_them(window: int, merge: int, patch: int) -> None:
    shape = replace(Shape.of(real_config("qwen2_5_vl")), window=window // merge // patch, merge=merge)
    rng = np.random.default_rng(0)
    grids = np.stack([rng.integers(1, 3, 60), *(2 * rng.integers(1, 40, (2, 60)))], axis=1)
    _, cu = vision_utils.get_vision_window_index(torch.from_numpy(grids), merge, window, patch)
    assert Work.of(shape, [], grids, 0).window_pairs == int((cu.diff().long() ** 2).sum())


def test_work_adds_up_and_survives_a_reduction() -> None:
    shape = Shape.of(real_config("qwen2_5_vl"))
    a, b = Work.of(shape, [5, 9], [(1, 4, 6)], 3), Work.of(shape, [7], [(2, 8, 2), (1, 10, 10)], 2)
    assert a + b == Work.of(shape, [5, 9, 7], [(1, 4, 6), (2, 8, 2), (1, 10, 10)], 5)
    assert Work(*torch.tensor([astuple(a), astuple(b)]).sum(0).tolist()) == a + b
    assert a + Work() == a
    assert Work.of(shape, torch.tensor([5, 9]), torch.tensor([[1, 4, 6]]), 3) == a
    assert Work.of(shape, [], np.zeros((0, 3)), 0) == Work()


def test_every_family_is_known_and_others_are_refused() -> None:
    for family in ROWS:
        assert Shape.of(make_config(family, make_tokenizer(family))).layers == 3
    with pytest.raises(ModelError, match="no FLOP count for models of type 'llama'"):
        Shape.of(type("Config", (), {"model_type": "llama"}))
