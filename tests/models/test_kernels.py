"""The faster layers against transformers' own, and their pieces against autograd."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from packed_rows import Example, gradients, packed_row
from torch import Tensor, nn
from torch.nn import functional as F

from vlft.models import attention, attention_by_cudnn, kernels
from vlft.models.forward import PackedVLM
from vlft.models.kernels import block as blocks
from vlft.models.kernels import four_bit, pointwise, product
from vlft.models.kernels.memory import KEEPS, Cost, Memory, Sizes, Tower, choose, memory_for, peak
from vlft.models.kernels.pointwise import Drop
from vlft.models.load import cast, open_checkpoint, source_of
from vlft.optim.remainder import master_of, remainder_of
from vlft.testing.conformance import example_row
from vlft.testing.tiny import FAMILIES
from vlft_strategies.full import Full
from vlft_strategies.lora import Lora, LoraLlmFullVit
from vlft_strategies.qlora import QLora

CUDA = [pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
DEVICES = ["cpu", *CUDA]
SEED = 3 * 2**60 + 12345
INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def near(found: Tensor | None, expected: Tensor | None, limit: float = 1e-5) -> bool:
    assert found is not None
    assert expected is not None
    assert found.shape == expected.shape
    a, b = found.detach().double(), expected.detach().double()
    return float((a - b).norm()) <= limit * float(b.norm()) + 1e-12


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if bias is not None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("width", [24, 1280, 3584])
def test_norms(device: str, kind: torch.dtype, centred: bool, width: int) -> None:
    x, branch, d_out, d_more = torch.randn(4, 37, width, device=device).to(kind)
    weight, bias = torch.randn(2, width, device=device)
    total, out, same = pointwise.norm(x, branch, weight, bias if centred else None, 1e-6, kind)
    assert same is out
    x_, branch_, weight_, bias_ = (t.float().requires_grad_() for t in (x, branch, weight, bias))
    sum_ = (x_ + branch_).to(kind).float().detach().requires_grad_()
    expected = plain_norm(sum_, weight_, bias_ if centred else None, 1e-6)
    limit = 1e-5 if kind == torch.float32 else 1e-2
    assert near(total, (x_ + branch_).to(kind), limit)
    assert near(out, expected, limit)
    assert out.dtype == kind
    assert pointwise.norm(x, None, weight, None, 1e-6, kind)[0] is x or not centred
    expected.backward(d_out.float())
    d_x, d_weight, d_bias = pointwise.norm_backward(
        d_out, total, weight, bias if centred else None, 1e-6, d_more, trains=True
    )
    assert sum_.grad is not None
    assert near(d_x, sum_.grad + d_more.float(), limit)
    assert near(d_weight, weight_.grad, limit)
    assert (d_bias is None) == (not centred)
    if centred:
        assert near(d_bias, bias_.grad, limit)
    drop = Drop(0.3, SEED)
    for plain in (True, False):
        _, left, dropped = pointwise.norm(x, branch, weight, bias if centred else None, 1e-6, kind, drop, plain=plain)
        assert near(dropped, drop.of(out), limit)
        assert near(left, out, limit) if plain else left is dropped
    assert pointwise.norm_backward(d_out, total, weight, None, 1e-6, None, trains=False)[1:] == (None, None)
    none = x[:0]  # of a row without samples
    assert pointwise.norm(none, none, weight, None, 1e-6, kind)[1].shape == (0, width)
    d_x, d_weight, _ = pointwise.norm_backward(none, none, weight, None, 1e-6, none, trains=True)
    assert d_x.shape == (0, width)
    assert d_weight is not None
    assert not d_weight.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 80), (4, 1, 128), (6, 2, 8)])
@pytest.mark.parametrize("norms", [False, True])
def test_rotation(device: str, kind: torch.dtype, heads: int, kv_heads: int, size: int, norms: bool) -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    tokens = 19
    qkv = torch.randn(tokens, heads + 2 * kv_heads, size, device=device).to(kind)
    angle = torch.randn(tokens, size // 2, device=device)
    cos, sin = (torch.cat((f(angle), f(angle)), -1) for f in (torch.cos, torch.sin))
    weights: Any = torch.randn(2, size, device=device) if norms else (None, None)
    q_, k_, v_ = (t.float().requires_grad_() for t in qkv.split([heads, kv_heads, kv_heads], 1))
    weights_ = [w.clone().requires_grad_() for w in weights] if norms else []
    qn, kn = (F.rms_norm(t, (size,), w, 1e-6) for t, w in zip((q_, k_), weights_, strict=True)) if norms else (q_, k_)
    expected = torch.cat((*apply_rotary_pos_emb_vision(qn, kn, cos, sin), v_), 1)
    before = qkv.clone()
    parts = pointwise.rotate(qkv, cos, sin, heads, kv_heads, *weights, 1e-6)
    assert all(part.is_contiguous() for part in parts)
    out = torch.cat(parts, 1)
    limit = 1e-5 if kind == torch.float32 else 1e-2
    assert near(out, expected, limit)
    assert torch.equal(qkv, before)
    d = torch.randn_like(expected)
    expected.backward(d)
    parts = d.to(kind).split([heads, kv_heads, kv_heads], 1)
    d_qkv, d_q_weight, d_k_weight = pointwise.rotate_backward(
        *parts, cos, sin, before if norms else None, *weights, 1e-6
    )
    assert q_.grad is not None
    assert k_.grad is not None
    assert v_.grad is not None
    assert near(d_qkv, torch.cat((q_.grad, k_.grad, v_.grad), 1), limit)
    if norms:
        assert near(d_q_weight, weights_[0].grad, limit)
        assert near(d_k_weight, weights_[1].grad, limit)


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu_gated": lambda x: F.silu(x[:, : x.shape[1] // 2]) * x[:, x.shape[1] // 2 :],
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("width", [20, 3456])
def test_activations(device: str, kind: torch.dtype, activation: Any, width: int) -> None:
    """The backward pass gives the activation once more, and columns of zeros stay zero."""
    inner = torch.randn(37, width * (2 if activation == "silu_gated" else 1), device=device).to(kind)
    inner[:, width - 3 : width] = 0
    inner[:, 2 * width - 3 :] = 0
    x = inner.float().requires_grad_()
    expected = PLAIN[activation](x)
    out, same = pointwise.activate(inner, activation)
    assert same is out
    limit = 1e-5 if kind == torch.float32 else 1e-2
    assert near(out, expected, limit)
    assert not out[:, width - 3 :].any()
    d_out = torch.randn_like(out)
    d_out[:, width - 3 :] = 0
    expected.backward(d_out.float())
    drop = Drop(0.3, SEED)
    left, dropped = pointwise.activate(inner, activation, drop)
    assert torch.equal(left, out)
    assert near(dropped, drop.of(out), limit)
    for this, plain, sums in ((None, True, None), (None, True, kind), (drop, True, torch.float32), (drop, False, None)):
        d_inner, again, dropped, summed = pointwise.activate_backward(
            inner.clone(), d_out.clone(), activation, this, plain=plain, sums=sums
        )
        assert near(d_inner, x.grad, limit)
        assert (summed is None) == (sums is None)
        if summed is not None:
            assert summed.dtype == sums
            assert near(summed, d_inner.double().sum(0), 1e-5 if sums == torch.float32 else 1e-2)
        assert near(again, expected, limit) if plain else again is dropped
        assert near(dropped, expected if this is None else drop.of(expected), limit)
    assert not d_inner[:, width - 3 : width].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("probability", [0.05, 0.3])
def test_dropout(device: str, probability: float) -> None:
    """A function of the seed; its rate, its mean and its independence of the place and of other seeds."""
    x = torch.ones(411, 512, device=device)
    drop = Drop(probability, SEED)
    out = pointwise.dropout(x, drop)
    assert torch.equal(out.cpu(), drop.of(x.cpu()))  # on every device the same
    assert torch.equal(x, torch.ones_like(x))
    dropped = (out == 0).double()
    assert float(dropped.mean()) == pytest.approx(probability, abs=0.005)
    assert float(out.mean()) == pytest.approx(1.0, abs=0.01)
    assert dropped.mean(0).max() < probability + 0.15
    assert dropped.mean(1).max() < probability + 0.15
    for shift in (1, 8, 512, 1024, 4096):
        both = float((dropped.flatten()[shift:] * dropped.flatten()[:-shift]).mean())
        assert both == pytest.approx(probability**2, abs=0.01)
    for other in (SEED + 1, SEED + 2**20, SEED + 2**31, SEED ^ 2**61):
        second = (pointwise.dropout(x, Drop(probability, other)) == 0).double()
        for shift in (0, 1, 2**20 % second.numel()):
            moved = second.flatten().roll(shift)
            assert float((dropped.flatten() * moved).mean()) == pytest.approx(probability**2, abs=0.01)


def test_nothing_and_everything_dropped() -> None:
    x = torch.randn(5, 7)
    assert torch.equal(pointwise.dropout(x, Drop(0.0, SEED)), x)
    assert not pointwise.dropout(x, Drop(1.0, SEED)).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "ranks", "width"), [(70, 4, 48), (129, 96, 200)])
def test_a_product_that_is_dropped(device: str, kind: torch.dtype, rows: int, ranks: int, width: int) -> None:
    if INTERPRETED and kind == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bf16 as if it were integers")
    low, a = torch.randn(rows, ranks, device=device).to(kind), torch.randn(ranks, width, device=device).to(kind)
    drop = Drop(0.3, SEED)
    expected = drop.of(low.float() @ a.float())
    assert near(pointwise.product_dropped(low, a, drop), expected, 1e-5 if kind == torch.float32 else 1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 15, 700])
@pytest.mark.parametrize("columns", [24, 1000])
def test_sums_of_columns(device: str, kind: torch.dtype, rows: int, columns: int) -> None:
    whole = torch.randn(rows, columns + 8, device=device).to(kind)
    for x in (whole, whole[:, 8:]):
        for wanted in (kind, torch.float32):
            found = pointwise.column_sums(x, wanted)
            assert found.dtype == wanted
            assert near(found, x.double().sum(0), 1e-5 if wanted == torch.float32 else 1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [24, 4096, 9999])
@pytest.mark.parametrize("rows", [0, 5])
def test_cross_entropy(
    device: str, kind: torch.dtype, vocabulary: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of logits that are far apart, whose exponents fp32 does not hold, and of some that are minus infinity."""
    monkeypatch.setattr(pointwise, "LOGITS_AT_ONCE", 2 * 4096)
    sizes = torch.tensor([1, 1, 10, 100, 300], device=device)[:rows, None]
    logits = (torch.randn(rows, vocabulary, device=device) * sizes).to(kind)
    logits[:2, : vocabulary // 2] = -torch.inf
    labels = torch.randint(vocabulary // 2, vocabulary, (rows,), device=device)
    d_losses = torch.rand(rows, device=device)
    exact, found = logits.double().requires_grad_(), logits.clone().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    losses = kernels.cross_entropy(found * 1, labels)
    assert losses.dtype == torch.float32
    assert near(losses, expected)
    (d_exact,) = torch.autograd.grad(expected, exact, d_losses.double())
    (d_found,) = torch.autograd.grad(losses, found, d_losses)
    assert d_found.dtype == kind
    assert near(d_found, d_exact, 1e-5 if kind == torch.float32 else 1e-2)
    if rows:
        losses = kernels.cross_entropy(found * 1, labels)
        torch.autograd.grad(losses, found, d_losses, retain_graph=True)
        with pytest.raises(RuntimeError, match="once"):
            torch.autograd.grad(losses, found, d_losses)
        with pytest.raises(RuntimeError, match="inplace operation"):
            torch.autograd.grad(kernels.cross_entropy(torch.tanh(found), labels), found, d_losses)


@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="elsewhere it is bitsandbytes itself")
@pytest.mark.parametrize("kind", [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 40), (65, 4096)])
def test_four_bits(kind: torch.dtype, shape: tuple[int, int]) -> None:
    """To the bit what bitsandbytes' kernels give, also where the last block and the last group of them are not full."""
    from bitsandbytes import functional as bnb

    device = "cpu" if INTERPRETED else "cuda"
    weight = (torch.randn(shape, device=device) * torch.rand(shape[0], 1, device=device)).to(kind)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    scales = state.state2
    scale = scales.code[state.absmax.long()] * scales.absmax.repeat_interleave(256)[: len(state.absmax)] + state.offset
    halves = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1).long()
    expected = (state.code[halves] * scale.repeat_interleave(64)[: len(halves)]).to(kind).view(shape)
    out = torch.full(shape, torch.nan, dtype=kind, device=device)
    if INTERPRETED:
        from vlft.models.kernels import on_gpu

        on_gpu.dequantize_4bit(
            packed, state.absmax, scales.code, scales.absmax, state.offset, state.code, out, 64, scales.blocksize
        )
    else:
        assert four_bit._has_kernel(packed, state, out)
        four_bit.dequantize(packed, state, out)
        assert torch.equal(out, bnb.dequantize_4bit(packed, state))
        shifted = packed.new_empty(packed.nbytes + 1)[1:].view_as(packed)
        assert not four_bit._has_kernel(shifted, state, out), "no word may begin there"
    assert torch.equal(out, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 80])
def test_attention_and_its_backward(device: str, kind: torch.dtype, size: int) -> None:
    """Of several segments, without a graph around it."""
    lengths = [64, 64, 1, 37, 16, 64]
    borders = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    q, k, v, d_out = torch.randn(4, sum(lengths), 3, size, device=device).to(kind)
    parts = [x.float().requires_grad_() for x in (q, k, v)]
    pieces = zip(*(x.split(lengths) for x in parts), strict=True)
    expected = torch.cat(
        [F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in piece)).transpose(0, 1) for piece in pieces]
    )
    attended = attention.attend(q, k, v, borders, 64, size**-0.5, causal=False, learns=True)
    limit = 1e-5 if kind == torch.float32 else 1e-2
    assert near(attended.out, expected, limit)
    expected.backward(d_out.float())
    for found, x in zip(attention.attend_backward(attended, d_out), parts, strict=True):
        assert near(found, x.grad, limit)


@pytest.mark.parametrize("strategy", [Full, LoraLlmFullVit])
@pytest.mark.parametrize("narrow", [False, True])
def test_masters_in_two_halves_change_nothing(tiny: Callable[..., Path], strategy: Any, narrow: bool) -> None:
    """Losses and gradients to the bit, of one row and of two; no copy is held of what lies ready now."""
    source = source_of(open_checkpoint(str(tiny())), "bf16", torch.device("cpu"))
    row, found, held = example_row(source), [], []
    for halves in (False, True):
        torch.manual_seed(0)
        made = strategy(strategy.Config()).prepare_model(source)
        cast(made, torch.bfloat16, masters=True)
        packed = PackedVLM(made, source.parts, source.config.image_token_id)
        packed.eval()  # no dropout
        packed.installed.holds = True
        masters = {name: p.detach().clone() for name, p in packed.named_parameters()}
        if halves:
            packed.split_masters()
            split = {name for name, p in packed.named_parameters() if remainder_of(p) is not None}
            layers = {n for n in masters if ".blocks." in n or (".layers." in n and strategy is Full)}
            assert split == {n for n in layers if "norm" not in n and "lora_" not in n}
        assert all(torch.equal(master_of(p), masters[name]) for name, p in packed.named_parameters())
        packed.narrow_gradients(torch.bfloat16 if narrow else None)
        losses = []
        for _ in range(1 if narrow else 2):
            with torch.autocast("cpu", torch.bfloat16):
                losses_S = packed(**row)
                losses_S.sum().backward()
            losses.append(losses_S.detach())
        found.append((losses, {name: p.grad for name, p in packed.named_parameters() if p.grad is not None}))
        held.append(sum(target.numel() for target, _, _ in packed.installed.held.trained))
    (losses, gradients), (same_losses, same_gradients) = found
    assert all(map(torch.equal, losses, same_losses))
    assert gradients.keys() == same_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == same_gradients[name].dtype, name
        assert torch.equal(gradient, same_gradients[name]), name
    assert held[1] < held[0]


@pytest.mark.parametrize("strategy", [Full, LoraLlmFullVit])
def test_gradients_of_one_row_stay_as_autocast_makes_them(tiny: Callable[..., Path], strategy: Any) -> None:
    """Those of the products' own weights, and no others; a step of several rows has all of them in fp32 again."""
    source = source_of(open_checkpoint(str(tiny())), "bf16", torch.device("cpu"))
    torch.manual_seed(0)
    made = strategy(strategy.Config()).prepare_model(source)
    cast(made, torch.bfloat16, masters=True)
    packed = PackedVLM(made, source.parts, source.config.image_token_id)
    packed.eval()  # no dropout
    packed.memory = Memory(packed.installed.learning(), 512, room=lambda: 1e12)
    row = example_row(source)

    def gradients() -> dict[str, Tensor]:
        packed.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            packed(**row).sum().backward()
        return {name: p.grad for name, p in packed.named_parameters() if p.grad is not None}

    wide = gradients()
    packed.zero_grad()
    size = packed.memory._missing()
    packed.narrow_gradients(torch.bfloat16)
    found = gradients()
    narrow = {name for name, gradient in found.items() if gradient.dtype == torch.bfloat16}
    assert narrow
    weights = {name for name in found if ".blocks." in name or ".layers." in name}
    assert narrow == {name for name in weights if found[name].ndim == 2 and "lora_" not in name}
    for name, gradient in found.items():
        assert torch.equal(gradient.float(), wide[name]), name
    packed.zero_grad()
    less = packed.memory._missing()
    assert all(a <= b for some, all_ in zip(less, size, strict=True) for a, b in zip(some, all_, strict=True))
    assert sum(map(sum, less)) == sum(map(sum, size)) - sum(2 * found[name].numel() for name in narrow)
    packed.narrow_gradients(None)
    assert {gradient.dtype for gradient in gradients().values()} == {torch.float32}
    packed.zero_grad()
    assert packed.memory._missing() == size


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.skipif(not HOPPER, reason="cuDNN's kernels run on Hopper")
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "causal"),
    [(16, 16, 80, False), (16, 16, 72, False), (16, 2, 128, True), (28, 4, 128, True), (4, 4, 64, True)],
)
def test_attention_by_cudnn(kind: torch.dtype, heads: int, kv_heads: int, size: int, causal: bool) -> None:
    """Of rows that share a graph though they differ in segments, longest and tokens; one of them fills it."""
    assert attention_by_cudnn.trouble() == ""
    graphs = attention_by_cudnn.graph.cache_info().misses
    for lengths in ([700, 1, 64, 523], [640, 648], [1024] + [128] * 7, [129] * 8):
        borders = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
        q, d_out = torch.randn(2, sum(lengths), heads, size, device="cuda").to(kind)
        k, v = torch.randn(2, sum(lengths), kv_heads, size, device="cuda").to(kind)
        parts = [x.float().requires_grad_() for x in (q, k, v)]
        expected = attention._segments(*parts, borders.tolist(), size**-0.5, causal)
        expected.backward(d_out.float())
        attended = attention.attend(q, k, v, borders, max(lengths), size**-0.5, causal=causal, learns=True)
        assert attended.cudnn is not None
        assert near(attended.out, expected, 1e-2)
        for found, x in zip(attention.attend_backward(attended, d_out), parts, strict=True):
            assert near(found, x.grad, 1e-2)
        alone = attention.attend(q, k, v, borders, max(lengths), size**-0.5, causal=causal, learns=False)
        assert alone.qkv is None
        assert torch.equal(alone.out, attended.out)
    assert attention_by_cudnn.graph.cache_info().misses - graphs <= 5


def test_rows_round_up_to_few_graphs() -> None:
    up = attention_by_cudnn._up
    assert [up(n, 8) for n in (1, 8, 9, 16, 17)] == [8, 8, 16, 16, 32]
    assert [up(n, 8, 4) for n in (3, 9, 4097, 5121, 7000, 8192, 8193)] == [8, 10, 5120, 6144, 7168, 8192, 10240]
    borders = torch.tensor([0, 3, 5], dtype=torch.int32)
    row = attention_by_cudnn.segments_of(borders, 3, 5)
    assert row.sizes == (8, 256, 8)
    q = torch.zeros(5, 4, 8)
    plan = row.plan(q, 2, 0.1, causal=True)
    numbers = plan.numbers
    assert numbers[attention_by_cudnn.Q_STARTS].tolist() == [0, 96] + [160] * 7
    assert numbers[attention_by_cudnn.K_STARTS].tolist() == [0, 48] + [80] * 7
    assert numbers[attention_by_cudnn.STATS_STARTS].tolist() == [0, 12] + [20] * 7
    assert numbers[attention_by_cudnn.Q_LENGTHS].tolist() == [3, 2] + [0] * 6
    assert {x.dtype for x in numbers.values()} == {torch.int32}
    assert (plan.forward_shape.tokens, plan.backward_shape.tokens) == (0, 8)
    # Layers that are alike share one, those of other rows do not.
    assert attention_by_cudnn.segments_of(borders, 3, 5).plan(q, 2, 0.1, causal=True) is plan
    assert row.plan(q, 2, 0.1, causal=False) is not plan
    assert attention_by_cudnn.segments_of(borders.clone(), 3, 5) is not row
    borders[1] = 2
    assert attention_by_cudnn.segments_of(borders, 3, 5).lengths.tolist()[:2] == [2, 3]
    with torch.inference_mode():
        assert attention_by_cudnn.segments_of(borders.clone(), 3, 5).lengths.tolist()[:2] == [2, 3]


def test_windows_are_left_to_flash_where_a_grid_cannot_count_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "varlen_available", lambda *_: True)
    monkeypatch.setattr(attention, "_short", lambda: SimpleNamespace(LONGEST=64))
    qkv = torch.zeros(8, 6, 80)
    for heads, segments, longest, causal in ((2, 9, 65, False), (2, 9, 64, True), (1, 9, 64, False), (2, 2**16, 64, 0)):
        assert not attention.has_windows(qkv, heads, torch.zeros(segments + 1), longest, causal=bool(causal))
    assert attention.has_windows(qkv, 2, torch.zeros(2**16), 64, causal=False)


@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="a kernel without a function beside it")
@pytest.mark.parametrize("size", [8, 80] if INTERPRETED else [8, 64, 72, 80, 128])
def test_windows_of_rotated_queries_and_keys(size: int) -> None:
    """The rotation, the attention and both backward passes by one kernel each way, in one piece of a head or in two."""
    device, kind = ("cpu", torch.float32) if INTERPRETED else ("cuda", torch.bfloat16)
    lengths, heads, scale = [64, 64, 1, 37, 16, 64], 3, size**-0.5
    borders = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    qkv = torch.randn(sum(lengths), 3 * heads, size, device=device).to(kind)
    cos, sin = torch.randn(2, sum(lengths), size // 2, device=device).repeat(1, 1, 2)
    d_out = torch.randn(sum(lengths), heads, size, device=device).to(kind)
    whole = qkv.cpu().float().requires_grad_()
    q, k = (pointwise._turned(x, cos.cpu(), sin.cpu()) for x in (whole[:, :heads], whole[:, heads : 2 * heads]))
    expected = attention.packed_attention(q, k, whole[:, 2 * heads :], borders.cpu(), 64, scale, causal=False)
    expected.backward(d_out.cpu().float())
    if not INTERPRETED:
        assert attention.has_windows(qkv, heads, borders, 64, causal=False)
    limit = 1e-5 if kind == torch.float32 else 1e-2
    assert near(attention.attend_windows(qkv, cos, sin, borders, scale).cpu(), expected, limit)
    d_qkv = attention.attend_windows_backward(d_out, qkv, cos, sin, borders, scale)
    assert near(d_qkv.cpu(), whole.grad, limit)


KERNELS = [
    name for name, one in vars(pointwise).items() if isinstance(one, FunctionType) and hasattr(one, "__wrapped__")
]


@pytest.mark.slow
@pytest.mark.timeout(900)  # two and a half minutes of one quiet processor, twice that beside another test
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run above")
def test_the_kernels_of_a_gpu_in_tritons_interpreter() -> None:
    """The same tests with the kernels in the place of the functions. Triton compiles or interprets a whole process."""
    pytest.importorskip("triton")
    script = (
        f"import sys, pytest\nKERNELS = {KERNELS}\n"
        "from vlft.models.kernels import on_gpu, pointwise\n"
        "from vlft import compiler\n"
        "compiler.trouble = lambda: ''\n"
        "for name in KERNELS:\n"
        "    assert hasattr(pointwise, name)\n"
        "    setattr(pointwise, name, getattr(on_gpu, name))\n"
        f"sys.exit(pytest.main(['-p', 'no:cacheprovider', '-p', 'no:xdist', {__file__!r},"
        " '-k', 'norms or rotation or activations or test_dropout or is_dropped or columns or cross or windows"
        " or four_bits']))\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
    assert "failed" not in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Whole layers

PICTURES = [[(1, 4, 6)], [], [(1, 2, 4), (1, 8, 10)]]
PREPARED: dict[str, tuple[Any, dict[str, Any]]] = {
    "full": (Full, {}),
    "lora": (Lora, {"lora_rank": 4, "lora_dropout": 0.0}),
    "lora and ViT": (LoraLlmFullVit, {"lora_rank": 4, "lora_dropout": 0.0}),
    "qlora": (QLora, {"lora_rank": 4, "lora_dropout": 0.0}),
}


def prepared(
    folder: Path, what: str, *, reference: bool = False, dtype: torch.dtype | None = None, **options: Any
) -> tuple[PackedVLM, dict[str, Any]]:
    """A packed model whose adapters do something, and a row for it."""
    source = source_of(open_checkpoint(str(folder)), "no", torch.device("cpu"))
    strategy, own = PREPARED[what]
    torch.manual_seed(0)
    model = strategy(strategy.Config(**{**own, **options})).prepare_model(source)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    packed = PackedVLM(model, source.parts, source.config.image_token_id, reference=reference).train()
    family = source.checkpoint.family.model_type
    row = packed_row([Example(family, source, grids, seed) for seed, grids in enumerate(PICTURES)])
    if dtype is not None:
        packed.to(dtype)
        row["pixel_values"] = row["pixel_values"].to(dtype)
    return packed, row


def run(packed: PackedVLM, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    packed.zero_grad()
    losses: Tensor = packed(**row)
    losses.sum().backward()
    return losses.detach(), gradients(packed.model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", PREPARED)
def test_layers_equal_transformers_own(tiny: Callable[..., Path], family: str, what: str) -> None:
    packed, row = prepared(tiny(family), what)
    reference, _ = prepared(tiny(family), what, reference=True)
    assert len(packed.installed.layers) == 6
    assert not packed.installed.left
    assert not reference.installed.layers
    found, expected = run(packed, row), run(reference, row)
    limit = 1e-5 if what != "qlora" else 1e-4  # its products take other ways through bf16 tables
    assert near(found[0], expected[0], limit)
    assert near(found[1], expected[1], limit)
    assert float(expected[1].norm()) > 0
    with torch.no_grad():
        assert near(packed.eval()(**row), expected[0], limit)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", ["full", "lora"])
def test_under_autocast_they_differ_as_bf16_does(tiny: Callable[..., Path], family: str, what: str) -> None:
    """No more than transformers' own layers in bf16 differ from those in fp32."""
    packed, row = prepared(tiny(family), what)
    reference, _ = prepared(tiny(family), what, reference=True)
    exact = run(reference, row)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(1)
        found, plain = run(packed, row), run(reference, row)
    for mine, theirs, true in zip(found, plain, exact, strict=True):
        noise = float((theirs - true).norm())
        assert 0 < float((mine - true).norm()) < 1.5 * noise


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", ["full", "lora"])
def test_what_is_kept_changes_nothing(tiny: Callable[..., Path], family: str, what: str) -> None:
    packed, row = prepared(tiny(family), what, **({"lora_dropout": 0.3} if what == "lora" else {}))
    expected = run(packed, row)
    for keep in KEEPS[1:]:
        for layer in packed.installed.layers:
            layer.keep = keep
        found = run(packed, row)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("keep", KEEPS)
def test_layers_with_windows_by_one_kernel(
    tiny: Callable[..., Path], keep: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a GPU, with functions in the place of its kernels: the same result, and nothing kept for nothing."""

    def windows(qkv: Tensor, cos: Tensor, sin: Tensor, borders: Tensor, scale: float) -> Tensor:
        heads = qkv.shape[1] // 3
        q, k, v = (x.contiguous() for x in qkv.split(heads, 1))
        q, k = (pointwise._turned(x, cos, sin) for x in (q, k))
        return attention.packed_attention(q, k, v, borders, None, scale, causal=False)

    def backward(d_out: Tensor, qkv: Tensor, *args: Any) -> Tensor:
        with torch.enable_grad():
            x = qkv.detach().requires_grad_()
            return torch.autograd.grad(windows(x, *args), x, d_out)[0]

    packed, row = prepared(tiny(), "full")
    expected = run(packed, row)
    calls: list[Any] = []
    has = lambda *_, causal: not causal  # noqa: E731
    monkeypatch.setattr(blocks, "has_windows", has)
    monkeypatch.setattr(blocks, "attend_windows", windows)
    monkeypatch.setattr(blocks, "attend_windows_backward", lambda *args: (calls.append(1), backward(*args))[1])
    for layer in packed.installed.layers:
        layer.keep = keep
    found = run(packed, row)
    assert len(calls) == len(packed.installed.vision)
    assert near(found[0], expected[0])
    assert near(found[1], expected[1])


@pytest.mark.parametrize("alike", [True, False])
def test_halves_that_are_rotated_by_other_angles_are_left_to_flash(
    tiny: Callable[..., Path], alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The windows' kernel reads the angles of one half: a tower that has others must not get them in silence."""
    monkeypatch.setattr(blocks, "has_windows", lambda *_, causal: not causal)
    packed, _ = prepared(tiny(), "full")
    block = packed.installed.vision[0].vlft_block
    cos, sin = torch.randn(2, 16, block.size // 2).repeat(1, 1, 2)
    if not alike:
        sin[-1, -1] += 1
    call = blocks.Call(cos, sin, torch.tensor([0, 16]), 16, torch.float32, "all", (None,) * 4)
    assert block._has_windows(torch.zeros(16, 3 * block.heads, block.size), call) is alike


@pytest.mark.parametrize("what", ["full", "lora"])
def test_widths_are_filled_up_unseen(tiny: Callable[..., Path], what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, row = prepared(tiny(), what)
    expected = run(packed, row)
    monkeypatch.setattr(product, "aligned", lambda width, device: width + 12)
    for packed.installed.holds in (False, True):
        found = run(packed, row)
        assert near(found[0], expected[0])
        assert near(found[1], expected[1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", PREPARED)
def test_what_is_held_changes_nothing(tiny: Callable[..., Path], family: str, what: str) -> None:
    """Joined copies of weights follow those that train; adapters may be switched off and on."""
    packed, row = prepared(tiny(family), what, **({"lora_dropout": 0.3} if what != "full" else {}))
    once = []
    for packed.installed.holds in (False, True, False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            once.append(run(packed, row))
        if len(once) == 2:
            assert packed.installed.held is not None
            assert packed.installed.held.trained
            with torch.no_grad():
                for p in packed.parameters():
                    if p.requires_grad:
                        p += 0.1 * p.mean()
    for found, expected in zip(once[1::2], once[::2], strict=True):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    assert not torch.equal(once[0][0], once[2][0])
    if what == "lora":
        with torch.no_grad(), packed.eval().model.disable_adapter():
            plain = packed(**row)
            packed.installed.holds = False
            assert near(plain, packed(**row))
        packed.installed.holds = True
        assert not near(packed(**row), plain, 1e-3)


def test_a_frozen_tower_keeps_nothing_though_its_input_has_a_gradient(tiny: Callable[..., Path]) -> None:
    """transformers' checkpointing asks for one, and a QLoRA on the GPU ran the tower's backward for nothing."""
    packed, row = prepared(tiny(), "lora")
    packed.hf.enable_input_require_grads()
    tower = packed.hf.model.visual
    seen: list[bool] = []
    tower.blocks[1].register_forward_hook(lambda _, __, out: seen.append(out.requires_grad))
    packed(**row).sum().backward()
    assert seen == [False]


def test_dropout_has_a_true_gradient_and_its_rate(tiny: Callable[..., Path]) -> None:
    packed, row = prepared(tiny(), "lora", dtype=torch.float64, lora_dropout=0.3)
    packed.image_token_id = -1
    text = {**row, "pixel_values": None, "image_grid_thw": row["image_grid_thw"][:0]}
    p = next(p for name, p in packed.model.named_parameters() if "layers.1.mlp.down_proj.lora_A" in name)

    def loss() -> Tensor:
        torch.manual_seed(1)
        return packed(**text).sum()

    (slope,) = torch.autograd.grad(loss(), p)
    direction = torch.randn_like(p)
    step = 1e-3  # transformers' last norm is in fp32 even here
    with torch.no_grad():
        p += step * direction
        above = loss()
        p -= 2 * step * direction
        below = loss()
    assert float((slope * direction).sum()) == pytest.approx(float((above - below) / (2 * step)), rel=1e-3)
    torch.manual_seed(1)
    one = packed(**text)
    torch.manual_seed(2)
    assert not torch.equal(one, packed(**text))


def test_adapters_that_are_switched_off_do_nothing(tiny: Callable[..., Path]) -> None:
    packed, row = prepared(tiny(), "lora")
    plain, _ = prepared(tiny(), "full")
    with torch.no_grad():
        adapted = packed(**row)
        with packed.model.disable_adapter():
            assert near(packed(**row), plain(**row))
    assert not near(adapted, plain(**row), 1e-3)


def test_a_layer_of_an_unknown_kind_keeps_its_forward_and_says_so(tiny: Callable[..., Path]) -> None:
    import peft

    source = source_of(open_checkpoint(str(tiny())), "no", torch.device("cpu"))
    options = {"r": 4, "target_modules": r".*language_model\.layers\.1\..*_proj", "use_dora": True}
    model = peft.get_peft_model(source.load(), peft.LoraConfig(**options))
    packed = PackedVLM(model, source.parts, source.config.image_token_id)
    assert len(packed.installed.layers) == 5
    assert str(packed.installed).endswith("1 keep transformers' forward: a variant of LoRA")


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def kept_by(packed: PackedVLM, row: dict[str, Any]) -> int:
    """Bytes that the graph of one forward holds."""
    import gc

    losses = packed(**row)
    held = sum(
        t.numel() * t.element_size() for t in {t.data_ptr(): t for t in gc.get_objects() if torch.is_tensor(t)}.values()
    )
    del losses
    return held


def test_less_is_kept_where_less_is_asked_for(tiny: Callable[..., Path]) -> None:
    packed, row = prepared(tiny(), "full")
    held = []
    for keep in KEEPS:
        packed.memory = memory_for(packed.installed, 512, {"vision": {keep: 3}, "language": {keep: 3}}, None)
        held.append(kept_by(packed, row))
    assert held[0] > held[1] > held[2] > held[3]


VISION = Tower(
    Cost(10, attended=20, queries=30, inner=100, again_attended=7.0, again_queries=3.0, again_inner=10.0), (0, 0)
)
LANGUAGE = Tower(
    Cost(10, attended=20, queries=30, inner=100, again_attended=0.4, again_queries=0.6, again_inner=15.0), (0, 0, 0)
)


def test_what_is_cheap_to_compute_again_goes_first() -> None:
    def at(room: float) -> str:
        letters = {"all": "A", "attention": "t", "attended": "d", "input": "i"}
        return " ".join("".join(letters[keep] for keep in tower) for tower in choose([VISION, LANGUAGE], 0.0, room))

    everything = peak([VISION, LANGUAGE], [["all"] * 2, ["all"] * 3], 0.0)
    assert everything == 5 * 160 + 3 * 100  # at the last layer, whose backward comes first
    assert at(everything) == "AA AAA"
    seen = [at(everything - less) for less in range(0, 900, 20)]
    assert seen[0] == "AA AAA"
    assert seen[-1] == "ii iii"
    assert len(set(seen)) > 5
    # 0.1 FLOPs a byte in the tower, twice; then the LLM's at 0.15, which open its cheap ones; 0.35 last.
    keeps = [choose([VISION, LANGUAGE], 0.0, room) for room in (1000, 850, 700, 0)]
    assert keeps[0][1] == ["all"] * 3
    assert keeps[0][0][0] == "attention"
    assert keeps[1] == [["attended"] * 2, ["all"] * 3]
    assert keeps[2][0] == ["attended"] * 2
    assert "attended" not in keeps[2][1]
    assert keeps[-1] == [["input"] * 2, ["input"] * 3]


def chosen_one_by_one(towers: list[Tower], head: float, room: float) -> list[list[Any]]:
    chosen: list[list[Any]] = [["all"] * tower.layers for tower in towers]
    steps: list[list[tuple[float, int, str]]] = []
    for tower in towers:
        c = tower.cost
        ratios = [
            (c.again_inner / max(c.inner, 1), "attention"), (c.again_queries / max(c.queries, 1), "attended"),
            (c.again_attended / max(c.attended, 1), "input"),
        ]  # fmt: skip
        steps.append([(ratio, i, keep) for ratio, keep in ratios for i in range(tower.layers)])
    while peak(towers, chosen, head) > room and any(steps):
        t = min((t for t, some in enumerate(steps) if some), key=lambda t: steps[t][0][0])
        _, i, keep = steps[t].pop(0)
        chosen[t][i] = keep
    return chosen


def test_the_search_finds_what_dropping_one_by_one_does() -> None:
    """Ratios of few values, so that many are equal; towers without layers; layers without inner values."""
    draw = random.Random(0)
    for _ in range(300):
        towers = [
            Tower(
                Cost(draw.choice([0, 7]), draw.choice([0, 40, 60]), draw.choice([0, 30]), draw.choice([0, 50, 100]),
                     60.0 * draw.randrange(4), 30.0 * draw.randrange(4), 50.0 * draw.randrange(4)),
                tuple(draw.choice([0, 0, 300]) for _ in range(draw.choice([0, 1, 2, 5]))),
            )
            for _ in range(draw.choice([1, 2, 2, 3]))
        ]  # fmt: skip
        head = draw.choice([0.0, 333.5])
        most = peak(towers, [["all"] * tower.layers for tower in towers], head)
        for room in (most, -1.0, *(draw.uniform(0.0, most) for _ in range(6))):
            assert choose(towers, head, room) == chosen_one_by_one(towers, head, room)


def test_gradients_come_as_kept_values_go() -> None:
    def of(*gradients: int) -> float:
        return peak([Tower(LANGUAGE.cost, gradients)], [["input"] * 4], 0.0)

    # Bytes of the first layer's backward: its input, what it computes again, and all gradients.
    assert of(*[1000] * 4) == 10 + 150 + 300 + 4 * 1000
    assert of(*[0] * 4) == 4 * 10 + 150 + 300
    # Where the upper half trains, all gradients are there with 3 inputs still kept; where the lower does, with one.
    assert of(0, 0, 1000, 1000) == 3 * 10 + 150 + 300 + 2 * 1000
    assert of(1000, 1000, 0, 0) == 10 + 150 + 300 + 2 * 1000
    assert peak([], [], 77.0) == 77.0
    assert peak([Tower(LANGUAGE.cost, (0,) * 4)], [["input"] * 4], 1e6) == 4 * 10 + 1e6


def test_no_weight_of_a_layer_is_looked_at_before_a_row(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO-3 would take it for one that the whole model needs, and gather it in each row."""
    packed, _ = prepared(tiny(), "lora")
    memory = Memory(packed.installed.learning(), 512, room=lambda: 1e12)
    monkeypatch.setattr(torch.nn.Module, "__getattr__", None)
    memory.before_row(100, 50, 60, 30, 10, torch.float32)
    assert memory.reckoned > 0


@pytest.mark.parametrize("cut_up", [False, True])
def test_adapters_that_come_later_are_reckoned_with(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, cut_up: bool
) -> None:
    packed, _ = prepared(tiny(), "lora")
    layers = packed.installed.learning()
    memory = Memory(layers, 512, room=lambda: 1e12, gradients_stay=not cut_up)
    more = dataclasses.replace(Sizes.of(layers[1][0].vlft_block), ranks=500)  # type: ignore[arg-type]
    monkeypatch.setattr(Sizes, "of", lambda _: more)
    memory.leave([])
    assert (memory._sizes[1] == more) != cut_up


def test_ranks_of_adapters_that_are_cut_up_are_those_of_whole_ones(tiny: Callable[..., Path]) -> None:
    packed, _ = prepared(tiny(), "lora")
    block = packed.installed.language[0].vlft_block
    whole = Sizes.of(block)  # type: ignore[arg-type]
    for name, p in packed.installed.language[0].named_parameters():
        if "lora" in name:
            p.ds_shape, p.data = p.shape, torch.empty(0)  # type: ignore[attr-defined]
    assert Sizes.of(block).ranks == whole.ranks > 0  # type: ignore[arg-type]


@pytest.mark.parametrize("frozen", [slice(0, 2), slice(1, 3)])
def test_frozen_layers_of_a_tower_that_trains_have_no_gradients_to_come(
    tiny: Callable[..., Path], frozen: slice
) -> None:
    """Room was once given for as many as all layers have that are like the last."""
    packed, row = prepared(tiny(), "full")
    for layer in packed.installed.language[frozen]:
        layer.requires_grad_(False)
    rooms = [1e12]
    memory = packed.memory = Memory(packed.installed.learning(), 512, room=lambda: rooms[0])
    sizes = [
        [4 * sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in tower]
        for tower in packed.installed.learning()
    ]
    assert [size > 0 for size in sizes[1]].count(False) == 2

    def most(come: list[list[int]]) -> float:
        patches, tokens, sample = len(row["pixel_values"]), row["input_ids_T"].shape[1], row["max_seqlen"]
        picture = int(row["image_grid_thw"][:, 1:].prod(1).max())
        head = 4.0 * int((row["labels_T"] != -100).sum()) * 512
        costs = [
            Cost.of(Sizes.of(layers[0].vlft_block), n, longest, 4)  # type: ignore[arg-type]
            for layers, n, longest in zip(memory.towers, (patches, tokens), (picture, sample), strict=True)
        ]
        towers = [Tower(cost, tuple(each)) for cost, each in zip(costs, come, strict=True)]
        return peak(towers, [["all"] * 3, ["all"] * 3], head)

    losses_S = packed(**row)
    assert memory.reckoned == most(sizes)
    for come in (sizes, [[0] * 3, [0] * 3]):  # a step's first row, and one behind it
        for less, fits in ((0, True), (1, False)):
            rooms[0] = most(come) - sum(map(sum, come)) - less
            again_S = packed(**row)
            assert (memory.now == [["all"] * 3, ["all"] * 3]) == fits
        losses_S.sum().backward()
        losses_S = again_S
    # Behind the step they are to come again; so are those of layers that are thawed, once the model is looked at anew.
    packed.zero_grad()
    for layer in packed.installed.language[frozen]:
        layer.requires_grad_(True)
    packed.settle()
    packed(**row)
    towers = packed.installed.learning()
    assert memory._row[0] == [
        Tower(tower.cost, tuple(4 * sum(p.numel() for p in layer.parameters()) for layer in layers))
        for tower, layers in zip(memory._row[0], towers, strict=True)
    ]


def test_a_row_chooses_by_the_room_there_is(tiny: Callable[..., Path]) -> None:
    packed, row = prepared(tiny(), "full")
    rooms = iter([1e12, 0.0])
    packed.memory = Memory(packed.installed.learning(), 512, room=lambda: next(rooms))
    packed(**row)
    assert packed.memory.now == [["all"] * 3, ["all"] * 3]
    assert str(packed.memory) == "what layers compute again in the backward pass is chosen for each row"
    packed(**row)
    assert packed.memory.now == [["input"] * 3, ["input"] * 3]
    assert "3 of 3 vision layers compute all but their input again" in str(packed.memory)
    with torch.no_grad():
        packed(**row)  # keeps nothing, asks for nothing


def test_a_frozen_tower_has_nothing_to_keep(tiny: Callable[..., Path]) -> None:
    packed, _ = prepared(tiny(), "lora")
    assert [len(layers) for layers in packed.installed.learning()] == [0, 3]
    whole, _ = prepared(tiny(), "lora and ViT")
    for layer in whole.installed.vision[:2]:
        layer.requires_grad_(False)
    assert [len(layers) for layers in whole.installed.learning()] == [1, 3]


@pytest.mark.parametrize("also", [None, "merger", "embed_tokens", "visual.blocks.2"])
def test_layers_below_all_that_trains_keep_nothing(tiny: Callable[..., Path], also: str | None) -> None:
    """Of the language model, too, unless a gradient goes further down: to pictures, or to the embedding."""
    packed, row = prepared(tiny(), "full")
    vision, language = int(also == "visual.blocks.2"), 3 if also else 1
    for name, p in packed.named_parameters():
        p.requires_grad_(".language_model.layers.2." in name or (also is not None and also in name))
    assert [len(layers) for layers in packed.installed.learning()] == [vision, language]
    packed.memory = Memory(packed.installed.learning(), 512, room=lambda: 1e12)
    run(packed, row)
    assert [len(keeps) for keeps in packed.memory.now] == [vision, language]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_that_a_layer_keeps_are_counted(tiny: Callable[..., Path], family: str) -> None:
    packed, row = prepared(tiny(family), "full")
    patches, tokens = len(row["pixel_values"]), row["input_ids_T"].shape[1]
    noted: list[Any] = []
    forward = blocks.Block.forward

    def note(self: Any, x_ND: Tensor, call: Any, kept: Any, *, learns: bool) -> Tensor:
        out: Tensor = forward(self, x_ND, call, kept, learns=learns)
        noted.append((self, len(x_ND), kept, call))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks.Block, "forward", note)
        packed(**row)
    assert {n for _, n, _, _ in noted} == {patches, tokens}
    for block, n, kept, call in noted:
        if call.rows_S is not None:
            continue
        cost = Cost.of(Sizes.of(block), n, n, 4)
        assert cost.inner == kept.inner.numel() * 4
        queries = [*kept.attended.qkv, *([] if kept.before is None else [kept.before])]
        assert cost.queries == sum(t.numel() * 4 for t in queries)
        # The log-sum-exp of the attention is counted for the GPU's kernel; this one keeps more.
        assert cost.attended == (kept.attended.out.numel() + kept.middle.numel() + n * block.heads) * 4


@pytest.mark.parametrize("holds", [False, True])
def test_biases_with_masters_over_frozen_weights_of_16_bits(tiny: Callable[..., Path], holds: bool) -> None:
    """As BitFit trains them (Ben Zaken et al. 2022)."""
    found = {}
    for reference in (True, False):
        packed, row = prepared(tiny(), "full", reference=reference, dtype=torch.bfloat16)
        packed.installed.holds = holds
        packed.requires_grad_(False)
        biases = {name: p for name, p in packed.named_parameters() if name.endswith("bias")}
        for p in biases.values():
            p.data = p.data.float()
            p.requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            packed(**row).sum().backward()
        assert {p.grad.dtype for p in biases.values() if p.grad is not None} == {torch.float32}
        found[reference] = {name: p.grad for name, p in biases.items()}
    norm = sum(float(g.double().square().sum()) for g in found[True].values() if g is not None) ** 0.5
    for name, expected in found[True].items():
        got = found[False][name]
        assert expected is not None
        assert got is not None
        assert float((got - expected).norm()) < 0.03 * norm, name
