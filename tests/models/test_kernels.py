"""The faster layers against transformers' own, and their pieces against autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vlft.models.kernels import pointwise

CUDA = [pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
DEVICES = ["cpu", *CUDA]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def near(found: Tensor | None, expected: Tensor | None, limit: float = 1e-5) -> bool:
    assert found is not None
    assert expected is not None
    assert found.shape == expected.shape
    a, b = found.double(), expected.double()
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
    total, out = pointwise.norm(x, branch, weight, bias if centred else None, 1e-6, kind)
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
    assert pointwise.norm_backward(d_out, total, weight, None, 1e-6, None, trains=False)[1:] == (None, None)


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
    out = pointwise.rotate(qkv, cos, sin, heads, kv_heads, *weights, 1e-6)
    limit = 1e-5 if kind == torch.float32 else 1e-2
    assert near(out, expected, limit)
    assert torch.equal(qkv, before) == norms
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
@pytest.mark.parametrize(("width", "columns"), [(20, 20), (3420, 3456)])
def test_activations(device: str, kind: torch.dtype, activation: Any, width: int, columns: int) -> None:
    """Columns behind the width, which hold what the memory held, neither come out nor change."""
    halves = 2 if activation == "silu_gated" else 1
    inner = torch.randn(5, halves, columns, device=device).to(kind)
    inner[:, :, width:] = torch.nan
    x = inner[:, :, :width].flatten(1).float().requires_grad_()
    expected = PLAIN[activation](x)
    out = pointwise.activate(inner.flatten(1), activation, width)
    limit = 1e-5 if kind == torch.float32 else 1e-2
    assert out.shape == (5, columns)
    assert near(out[:, :width], expected, limit)
    assert not out[:, width:].any()
    d_out = torch.randn_like(out)
    expected.backward(d_out[:, :width].float())
    d_inner = pointwise.activate_backward(inner.flatten(1), d_out, activation, width)
    assert near(d_inner.view(5, halves, columns)[:, :, :width].flatten(1), x.grad, limit)
