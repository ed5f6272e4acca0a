from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import command, final_weights, metrics, train, write_data
from torch import Tensor, nn

from vlft import ParamGroup, compiler
from vlft.engine.base import Engine
from vlft.errors import ConfigError
from vlft.optim import build_optimizer, gradient_dtype, schedule, set_rates, step_was_left_out
from vlft.optim.remainder import join, keep_remainder, master_dtype, master_of, split
from vlft.optim.rounded import (
    BLOCK,
    KernelAdamW,
    States,
    add_up,
    decode_m,
    decode_v,
    encode_m,
    encode_v,
    rounded,
)

NAMES = ["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]


@pytest.mark.parametrize("name", NAMES)
def test_no_step_of_a_schedule_is_wasted_at_rate_zero(name: str) -> None:
    factor = schedule(name, 3, 10)
    values = [factor(step) for step in range(10)]
    assert all(0 < v <= 1 for v in values)
    if name != "constant":
        assert values[0] == pytest.approx(1 / 3)
    assert values[2] == pytest.approx(1)


def test_cosine_falls_to_almost_nothing() -> None:
    factor = schedule("cosine", 0, 100)
    assert factor(99) < 1e-3
    assert factor(50) == pytest.approx(0.5, abs=0.02)


def test_rates_follow_the_part_and_decay_spares_vectors() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "head": nn.Linear(2, 2, bias=False)})
    groups = [
        ParamGroup("a", ("a.weight", "a.bias"), "llm"),
        ParamGroup("b", ("b.weight",), "vit", lr_scale=0.5, weight_decay=0.2),
        ParamGroup("head", ("head.weight",), "head"),
    ]
    optimizer = build_optimizer(model, groups, {"llm": 1e-3, "vit": 1e-2}, 0.1)
    found = {g["name"]: (g["names"], g["peak_lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert found == {
        "a": (["a.weight"], 1e-3, 0.1),
        "a/no_decay": (["a.bias"], 1e-3, 0.0),
        "b": (["b.weight"], 5e-3, 0.2),
        "head": (["head.weight"], 1e-3, 0.1),
    }
    assert set_rates(optimizer, 0.5) == {"llm": 5e-4, "vit": 2.5e-3, "head": 5e-4}


def test_a_model_that_goes_to_the_gpu_later_has_one_kernel_for_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it will be cut up it lies on the CPU when its optimizer is built; torch's own choice for FSDP is a loop."""
    model, groups = nn.Linear(2, 2), [ParamGroup("all", ("weight", "bias"), "llm")]
    gpu = torch.device("cuda")
    monkeypatch.setattr(compiler, "trouble", lambda: "")
    for device, fused in ((gpu, True), (torch.device("cpu"), False), (None, False)):
        optimizer = build_optimizer(model, groups, {"llm": 1e-3}, 0.1, device=device, torchs_own=True)
        assert {bool(group["fused"]) for group in optimizer.param_groups} == {fused}
        own = build_optimizer(model, groups, {"llm": 1e-3}, 0.1, device=device)
        assert isinstance(own, KernelAdamW) == fused
    # Masters are what it is for; and a kernel must compile.
    halves = nn.Linear(2, 2, dtype=torch.bfloat16)
    assert type(build_optimizer(halves, groups, {"llm": 1e-3}, 0.1, device=gpu)) is torch.optim.AdamW
    monkeypatch.setattr(compiler, "trouble", lambda: "no compiler")
    assert type(build_optimizer(model, groups, {"llm": 1e-3}, 0.1, device=gpu)) is torch.optim.AdamW


def test_with_fp32_states_it_is_torchs_adamw() -> None:
    """Also of what a checkpoint holds, so that a run goes on by either."""
    torch.manual_seed(0)
    start, gradients = torch.randn(40, 33), torch.randn(6, 40, 33) * torch.logspace(-6, 2, 6).view(-1, 1, 1)
    ends = []
    for make in (torch.optim.AdamW, lambda ps, **how: KernelAdamW(ps, "fp32", **how)):
        w = nn.Parameter(start.clone())
        optimizer = make([w], lr=1e-2, weight_decay=0.1)
        for gradient in gradients:
            w.grad = gradient.clone()
            optimizer.step()
        ends.append((w.detach(), *(optimizer.state[w][name] for name in ("exp_avg", "exp_avg_sq", "step"))))
        assert {*optimizer.state[w]} == {"exp_avg", "exp_avg_sq", "step"}
    for known, found in zip(*ends, strict=True):
        torch.testing.assert_close(found, known, rtol=2e-6, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# Without masters


def mean_of(draws: Callable[[Tensor], Tensor], times: int = 3000) -> Tensor:
    torch.manual_seed(0)
    return torch.stack([draws(torch.rand(1, BLOCK)) for _ in range(times)]).mean(0)


def test_rounding_keeps_the_mean_and_what_fits() -> None:
    x = torch.randn(1, BLOCK) * torch.logspace(-6, 2, BLOCK)
    mean = mean_of(lambda random: rounded(x, random).float())
    assert float(((mean - x) / x).abs().max()) < 2**-8 / 10
    exact = x.to(torch.bfloat16)
    assert torch.equal(rounded(exact.float(), torch.full_like(x, 0.999)), exact)


def test_codes_keep_the_mean_and_are_near() -> None:
    # All within the codes' range: of what randn gives next to zero, the mean of 3000 draws says little.
    m = torch.randn(1, BLOCK).sign() * (0.5 + torch.rand(1, BLOCK)) * torch.logspace(-3, 0, BLOCK)
    mean = mean_of(lambda random: decode_m(*encode_m(m, random)))
    assert float(((mean - m) / m).abs().max()) < 0.02
    assert float(((decode_m(*encode_m(m, torch.rand_like(m))) - m) / m).abs().max()) < 0.0905  # 2^(1/8) - 1
    v = m.square()
    mean = mean_of(lambda random: decode_v(*encode_v(v, random)))
    assert float(((mean - v) / v).abs().max()) < 0.02


def test_codes_of_zeros_and_of_values_beyond_their_range() -> None:
    nothing = torch.zeros(2, BLOCK)
    assert not decode_m(*encode_m(nothing, torch.rand_like(nothing))).any()
    assert not decode_v(*encode_v(nothing, torch.rand_like(nothing))).any()
    m = torch.full((1, BLOCK), 1e-6)
    m[0, 0] = -1.0
    mean = mean_of(lambda random: decode_m(*encode_m(m, random)), 20_000)
    assert float(mean[0, 0]) == -1.0
    assert float(mean[0, 1:].mean()) == pytest.approx(1e-6, rel=0.05)
    v = torch.full((1, BLOCK), 1e-30)
    v[0, 0] = 1.0
    assert float(decode_v(*encode_v(v, torch.rand_like(v))).min()) > 0  # Adam divides by its root


@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_it_goes_where_adamw_goes(states: States) -> None:
    """A regression whose inputs differ in scale by 10^4; rates at which rounding to nearest stands still."""
    torch.manual_seed(0)
    x = torch.randn(512, 300) * torch.logspace(-2, 2, 300)
    y = x @ (torch.randn(300, 4) / torch.logspace(-2, 2, 300).unsqueeze(1))

    def end(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], dtype: torch.dtype) -> float:
        torch.manual_seed(1)
        w = nn.Parameter((torch.randn(300, 4) * 0.5).to(dtype))
        optimizer = make([w])
        for step in range(600):
            rows = slice(step * 32 % 512, step * 32 % 512 + 32)
            loss = ((x[rows] @ w.float() - y[rows]) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(((x @ w.detach().float() - y) ** 2).mean().sqrt() / y.std())

    rate = {"lr": 3e-4, "weight_decay": 0.0}
    exact = end(lambda w: torch.optim.AdamW(w, **rate), torch.float32)
    nearest = end(lambda w: torch.optim.AdamW(w, **rate), torch.bfloat16)
    found = end(lambda w: KernelAdamW(w, states, **rate), torch.bfloat16)
    start = end(lambda w: torch.optim.SGD(w, lr=0.0), torch.float32)
    assert exact < 0.9 * start
    assert (start - found) > 0.95 * (start - exact)
    assert (start - nearest) < 0.8 * (start - exact)


def test_the_bytes_of_its_states_are_those_it_says() -> None:
    for states, each in (("fp32", 8.0), ("bf16", 4.0), ("8bit", 2.04)):
        kind = torch.float32 if states == "fp32" else torch.bfloat16
        p = nn.Parameter(torch.zeros(1000, 77, dtype=kind))
        optimizer = KernelAdamW([p], states)  # type: ignore[arg-type]
        p.grad = torch.ones_like(p)
        optimizer.step()
        held = sum(t.numel() * t.element_size() for name, t in optimizer.state[p].items() if name != "step")
        assert optimizer.state_bytes(p) == pytest.approx(held, abs=2 * BLOCK)
        assert held / p.numel() == pytest.approx(each, rel=0.01)


INTERPRETED = """
import sys, torch
from vlft.optim import on_gpu, rounded
from vlft.optim.remainder import keep_remainder, master_of, remainder_of
shapes = [(3, 700), (5,), (40, 999), (7, 256)]
torch.manual_seed(0)
values = [torch.randn(2, *shape).to(torch.bfloat16) for shape in shapes]
group = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
for states, halves in (("bf16", False), ("8bit", False), ("fp32", False), ("fp32", True)):
    kind = torch.float32 if states == "fp32" else torch.bfloat16
    for scale in (None, torch.tensor(3.0)):
        ends = []
        for fast in (False, True):
            weights = [torch.nn.Parameter(v[0].to(kind, copy=True)) for v in values]
            for w in weights if halves else ():
                keep_remainder(w)
            optimizer = rounded.KernelAdamW(weights, states)
            kept = [optimizer._fresh(w) for w in weights]
            for step in range(1, 5):
                jobs = []
                for k, (w, v, state) in enumerate(zip(weights, values, kept)):
                    state["step"] += 1
                    facts, rest = rounded.facts(group, step), remainder_of(w)
                    jobs.append(rounded.Job(w.data, v[1] * step, state, facts, step + 10 * k, rest))
                if fast:
                    on_gpu.update(jobs, scale)
                else:
                    for job in jobs:
                        rounded.update(job, scale)
            for w, state in zip(weights, kept):
                n = w.numel()
                if states == "8bit":
                    m = rounded.decode_m(state["exp_avg"], state["exp_avg_scale"]).flatten()[:n]
                    v = rounded.decode_v(state["exp_avg_sq"], state["exp_avg_sq_scale"]).flatten()[:n]
                else:
                    m, v = state["exp_avg"].float().flatten(), state["exp_avg_sq"].float().flatten()
                ends.append((master_of(w).float().flatten(), m, v))
        half = len(ends) // 2
        for shape, plain, found in zip(shapes, ends[:half], ends[half:]):
            for name, a, b, limit in zip("wmv", plain, found, (0.01, 0.1, 0.1)):
                distance = float((a - b).norm() / b.norm())
                if states == "fp32":
                    assert distance < 1e-6, (shape, name, distance)
                    continue
                # Other random digits, the same values.
                assert (0 < distance or len(a) < 100) and distance < limit, (states, shape, name, distance)
                if len(a) > 1000:
                    bias = float(((a - b) / b.abs().clamp(min=1e-3 * float(b.abs().max()))).mean())
                    assert abs(bias) < 0.01, (states, shape, name, bias)
        weights = [torch.nn.Parameter(v[0].clone()) for v in values]
        optimizer = rounded.KernelAdamW(weights, states)
        kept = [optimizer._fresh(w) for w in weights]
        jobs = [rounded.Job(w.data, v[1] * float("nan"), state, rounded.facts(group, 1), 1)
                for w, v, state in zip(weights, values, kept)]
        on_gpu.update(jobs, torch.tensor(float("nan")), torch.tensor(1.0))
        assert all(torch.equal(w, v[0]) for w, v in zip(weights, values))
        assert not any(t.any() for state in kept for t in state.values())
total, more = torch.ones(3001).to(torch.bfloat16), torch.full((3001,), 0.001).to(torch.bfloat16)
for row in range(400):
    on_gpu.add_up(total, more, row)
assert abs(float(total.double().mean()) - 1 - 400 * float(more[0])) < 0.003
total, more = torch.randn(2, 3001).to(torch.bfloat16)
exact = total.double() + more.double()
on_gpu.add_up(total, more, 5)
assert float((total.double() - exact).norm() / exact.norm()) < 0.003
for value in (float("nan"), float("inf"), -float("inf")):
    total = torch.ones(300).to(torch.bfloat16)
    on_gpu.add_up(total, torch.full_like(total, value), 1)
    assert not total.isfinite().any()
print("equal")
"""


def engine_of(*weights: nn.Parameter) -> Engine:
    engine = Engine("no", 1.0)
    engine.prepare(nn.ParameterList(weights), torch.optim.SGD([{"params": [*weights], "part": "llm"}]))
    return engine


def test_narrow_gradients_of_masters() -> None:
    """Where no other row's, no other rank's are added; the step reads what it would read of the same in fp32."""
    ends = []
    for kind in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        w = nn.Parameter(torch.randn(64, 33))
        engine = Engine("no", 1.0)
        engine.precision = "bf16"
        optimizer = KernelAdamW([{"params": [w], "part": "llm"}], "fp32", lr=1e-2)
        engine.prepare(nn.ParameterList([w]), optimizer)
        assert engine.narrows_gradients
        w.grad_dtype = kind
        assert engine.pending_bytes() == (8 + kind.itemsize) * w.numel()
        for _ in range(3):
            (w * torch.randn(64, 33).bfloat16().to(engine.device)).sum().backward()
            assert w.grad is not None
            assert w.grad.dtype == kind
            engine.update()
        ends.append(w.detach())
    assert torch.equal(*ends)
    engine.precision = "no"
    assert not engine.splits_masters
    engine.precision, engine.world_size = "bf16", 2
    assert not engine.narrows_gradients
    assert engine.splits_masters
    engine.world_size = 1
    engine.prepare(nn.ParameterList([w]), torch.optim.AdamW([{"params": [w], "part": "llm"}]))
    assert not engine.splits_masters


def test_many_small_gradients_of_a_step_do_not_stand_still() -> None:
    """Each is less than half a digit of the first; to the nearest, their sum would be the first alone."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(4000, dtype=torch.bfloat16))
    engine = engine_of(w)
    for row in range(401):
        engine.backward((w * (0.001 if row else 1.0)).sum(), last=row == 400)
    assert w.grad is not None
    assert w.grad.dtype == torch.bfloat16
    step = float(torch.tensor(0.001).to(torch.bfloat16))
    assert float(w.grad.double().mean()) == pytest.approx(1 + 400 * step, rel=0.002)


def test_a_step_s_gradient_in_rows_is_that_of_one_row_but_for_bf16s_noise() -> None:
    torch.manual_seed(0)
    rows = torch.randn(16, 40_000).to(torch.bfloat16)
    w = nn.Parameter(torch.zeros(40_000, dtype=torch.bfloat16))
    seldom, never = (nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2))
    masters = nn.Parameter(torch.zeros(40_000))
    engine = engine_of(w, seldom, never, masters)
    rows = rows.to(engine.device)
    for row, x in enumerate(rows):
        loss = (w * x).sum() + (masters * x.float()).sum() + (seldom.sum() if row == 3 else 0.0)
        engine.backward(loss, last=row == 15)
    exact = rows.double().sum(0)
    assert w.grad is not None
    assert masters.grad is not None
    error = w.grad.double() - exact
    assert float(error.norm() / exact.norm()) < 0.008
    assert abs(float((error * exact).sum() / exact.square().sum())) < 0.0002  # to either side
    assert float((masters.grad.double() - exact).norm() / exact.norm()) < 1e-6
    assert torch.equal(seldom.grad, torch.ones_like(seldom))  # type: ignore[arg-type]
    assert never.grad is None


def test_a_row_that_fails_on_its_way_leaves_gradients_that_can_be_dropped() -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, d: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("full")

    a, b = (nn.Parameter(torch.ones(8, dtype=torch.bfloat16)) for _ in range(2))
    engine = engine_of(a, b)
    engine.backward(a.sum() + b.sum(), last=False)
    with pytest.raises(torch.OutOfMemoryError):
        engine.backward(a.sum() + Fails.apply(b).sum(), last=True)  # type: ignore[no-untyped-call]
    assert a.grad is not None
    assert b.grad is not None
    assert not a._post_accumulate_grad_hooks
    assert not engine.reduce(fits=False)
    assert a.grad is None
    engine.backward(2 * a.sum() + b.sum(), last=True)
    assert torch.equal(a.grad, torch.full_like(a, 2.0))


def test_what_is_not_finite_stays_so_when_it_is_added_up() -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        total = torch.ones(512, dtype=torch.bfloat16)
        add_up(total, torch.full_like(total, value), 1)
        assert torch.equal(total, torch.full_like(total, value)) or bool(total.isnan().all())
    bits = torch.full((512,), 0x7FFF, dtype=torch.int16).view(torch.bfloat16)  # a GPU's NaN
    add_up(bits, torch.ones_like(bits), 1)
    assert bits.isnan().all()


def test_two_halves_are_the_number() -> None:
    """And the upper one is the nearest of bf16."""
    torch.manual_seed(0)
    known = torch.cat(
        [
            torch.randn(100_000) * torch.logspace(-30, 30, 100_000),
            torch.tensor([0.0, -0.0, 1e-45, -1e-45, torch.inf, -torch.inf]),
            torch.arange(0x3F800000, 0x3F820000, dtype=torch.int32).view(torch.float32),  # every remainder, twice
        ]
    )
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    upper, lower = split(nan)
    assert upper.isnan().all()
    assert join(upper, lower).isnan().all()
    upper, lower = split(known)
    assert (upper.dtype, lower.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join(upper, lower).view(torch.int32), known.view(torch.int32))
    nearest = known.to(torch.bfloat16)
    ties = (known.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(upper[~ties], nearest[~ties])
    equally = (upper.double() - known.double()).abs() == (nearest.double() - known.double()).abs()
    assert equally[ties].all()


def test_a_step_of_two_halves_is_that_of_the_whole() -> None:
    """To the bit, in 20 steps at a rate that bf16 alone would lose, with gradients in either dtype."""
    torch.manual_seed(0)
    start, gradients = torch.randn(2, 70, 33), torch.randn(20, 2, 70, 33)
    ends = []
    for halves in (False, True):
        weights = [nn.Parameter(x.clone()) for x in start]
        for w in weights if halves else ():
            keep_remainder(w)
            assert (w.dtype, master_dtype(w), gradient_dtype(w)) == (torch.bfloat16, torch.float32, torch.float32)
        optimizer = KernelAdamW(weights, "fp32", lr=2e-6)
        for gradient in gradients:
            for w, kind, g in zip(weights, (torch.float32, torch.bfloat16), gradient, strict=True):
                w.grad_dtype = kind
                w.grad = g.to(kind)
            optimizer.step()
            optimizer.zero_grad()
        ends.append([master_of(w) for w in weights])
    for whole, joined, before in zip(*ends, start, strict=True):
        assert torch.equal(whole, joined)
        assert not torch.equal(whole, before)


@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit"])
def test_every_parameter_has_its_own_count_of_steps(states: States) -> None:
    """Also of one without a gradient in some steps, and of an optimizer that goes on from a checkpoint."""
    torch.manual_seed(0)
    kind = torch.float32 if states == "fp32" else torch.bfloat16
    start, gradients = torch.randn(3, 300).to(kind), torch.randn(4, 3, 300).to(kind)
    has = [(0, 1), (1, 2), (0, 2), (0, 1, 2)]  # in each step

    def go(optimizer: KernelAdamW, weights: list[nn.Parameter], steps: range) -> None:
        for step in steps:
            for i, w in enumerate(weights):
                w.grad = gradients[step, i].clone() if i in has[step] else None
            optimizer.step()

    whole, first = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    straight, before = KernelAdamW(whole, states, lr=1e-2), KernelAdamW(first, states, lr=1e-2)
    go(straight, whole, range(4))
    assert [int(straight.state[w]["step"]) for w in whole] == [3, 3, 3]
    go(before, first, range(2))
    assert [int(before.state[w]["step"]) for w in first] == [1, 2, 1]
    then = [nn.Parameter(w.detach().clone()) for w in first]
    after = KernelAdamW(then, states, lr=1e-2)
    for old, new in zip(first, then, strict=True):
        after.state[new] = {name: value.clone() for name, value in before.state[old].items()}
    go(after, then, range(2, 4))
    assert [int(after.state[w]["step"]) for w in then] == [3, 3, 3]
    for one, other in zip(whole, then, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit"])
def test_a_gradient_that_is_not_finite_leaves_everything_as_it_is(states: States) -> None:
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(300, dtype=torch.float32 if states == "fp32" else torch.bfloat16))
    optimizer = KernelAdamW([w], states, lr=1e-2)
    w.grad = torch.ones_like(w)
    optimizer.step()
    before = {name: value.clone() for name, value in {**optimizer.state[w], "w": w.detach()}.items()}
    w.grad = torch.full_like(w, torch.nan)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(torch.nan), torch.tensor(1.0)
    optimizer.step()
    step_was_left_out(optimizer)
    after = {**optimizer.state[w], "w": w.detach()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    w.grad = None
    optimizer.step()
    step_was_left_out(optimizer)  # of a step that counted nothing
    w.grad, optimizer.grad_scale, optimizer.found_inf = torch.ones_like(w), torch.tensor(1.0), torch.tensor(0.0)
    optimizer.step()
    assert int(optimizer.state[w]["step"]) == 2
    assert not torch.equal(w, before["w"])


def test_gradients_are_divided_in_the_step() -> None:
    ends = []
    for scale in (None, torch.tensor(4.0)):
        torch.manual_seed(0)
        w = nn.Parameter(torch.randn(300, dtype=torch.bfloat16))
        optimizer = KernelAdamW([w], "bf16", lr=0.0, betas=(0.0, 0.0))
        w.grad = torch.ones_like(w) * (1.0 if scale is None else 4.0)
        optimizer.grad_scale = scale
        optimizer.step()
        ends.append(optimizer.state[w]["exp_avg"])
    assert torch.equal(*ends)


@pytest.mark.slow
def test_the_kernel_of_a_gpu_in_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("equal")


@pytest.mark.parametrize("kind", ["adamw_bf16", "adamw_8bit"])
def test_a_run_without_masters_learns_and_a_resume_is_exact(
    tiny: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    registry = write_data(tmp_path, 24)
    options: dict[str, Any] = {
        "optim": kind, "mixed_precision": "bf16", "learning_rate_llm": 1e-3, "learning_rate_vit": 1e-3,
        "learning_rate_projector": 1e-3, "save_steps": 4, "max_steps": 8,
    }  # fmt: skip
    train(command(tiny(), registry, tmp_path / "one", "full", **options))
    losses = [line["loss"] for line in metrics(tmp_path / "one")]
    train(command(tiny(), registry, tmp_path / "with", "full", **{**options, "optim": "adamw"}))
    exact = [line["loss"] for line in metrics(tmp_path / "with")]
    assert losses[-1] < losses[0] - 0.5
    assert losses == pytest.approx(exact, rel=0.03)
    checkpoint = tmp_path / "one" / "checkpoints" / "step-000004"
    assert checkpoint.is_dir()
    train(command(tiny(), registry, tmp_path / "two", "full", **options, resume_from_checkpoint=checkpoint))
    a, b = final_weights(tmp_path / "one"), final_weights(tmp_path / "two")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert {t.dtype for t in a.values()} == {torch.bfloat16}


def test_masters_are_kept_where_bf16_is_not_what_runs(tiny: Callable[..., Path], tmp_path: Path) -> None:
    registry = write_data(tmp_path, 4)
    with pytest.raises(ConfigError, match="give --mixed_precision bf16, or use adamw"):
        train(command(tiny(), registry, tmp_path / "out", "full", optim="adamw_8bit", mixed_precision="no"))


def test_weights_decay_by_less_than_a_digit() -> None:
    w = nn.Parameter(torch.ones(BLOCK * 40, dtype=torch.bfloat16))
    optimizer = KernelAdamW([w], "bf16", lr=2e-5, weight_decay=0.01)
    for _ in range(200):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    assert float(1 - w.detach().double().mean()) == pytest.approx(200 * 2e-7, rel=0.5)
