"""The conformance kit: what vlft checks of a strategy, on tiny random models of every family, on the CPU in seconds.

from vlft.testing import check_strategy
def test_conforms(tmp_path):
    check_strategy(MyStrategy, tmp_path)
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlft.discovery import broken_promise
from vlft.errors import StrategyError, VlftError
from vlft.export import merged, needed, save_result
from vlft.models.forward import PackedVLM, base_model
from vlft.models.load import Source, cast, load_hf, open_checkpoint, source_of
from vlft.optim import build_optimizer
from vlft.proof import Proof, check_groups
from vlft.strategy import Exporter, Strategy
from vlft.testing.tiny import FAMILIES, make_checkpoint


def check_strategy(
    cls: type[Strategy], folder: Path, *, families: Sequence[str] = FAMILIES, options: dict[str, Any] | None = None
) -> None:
    """Hold a strategy class to its contract.

    Checked: its Config is a StrategyConfig and its module imports no torch; the groups cover exactly what trains;
    each promised part gets a gradient and moves in one step, nothing frozen moves; the result saved, loaded and
    merged gives the trained model's logits (fp32: 1e-4).

    Args:
        folder: an empty folder to work in.
        options: values for the strategy's Config.
    Raises:
        StrategyError: says what was promised and not kept.
    """
    if problem := broken_promise(cls):
        raise StrategyError(f"{cls.__name__} {problem}.")
    _check_light_import(cls)
    for family in families:
        base = make_checkpoint(family, folder / family / "base")
        try:
            _check_family(cls, base, folder / family / "result", options or {})
        except VlftError:
            raise
        except Exception as error:  # a plugin may raise anything
            raise StrategyError(f"{cls.__name__} on {family}: {type(error).__name__}: {error}") from error


def _check_light_import(cls: type[Strategy]) -> None:
    module = cls.__module__
    heavy = "any(m in sys.modules for m in ('torch', 'peft', 'transformers'))"
    code = f"import sys, {module}, {cls.Config.__module__}; sys.exit({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or ["it imports torch, peft or transformers"]
        raise StrategyError(f"{module} cannot be read by `--help`: {why[0]}; import heavy packages inside methods.")


def example_row(source: Source, *, picture: bool = True, seed: int = 0) -> dict[str, Any]:
    """Arguments of `PackedVLM.forward`: two short samples, the second with a picture of 2 x 3 tokens."""
    from vlft.data.positions import mrope

    vision, generator = source.config.vision_config, torch.Generator().manual_seed(seed)
    image = int(source.config.image_token_id)
    words = [torch.randint(20, 400, (n,), generator=generator) for n in (9, 3, 5)]
    first, second = words[0], torch.cat([words[1], torch.full((6 if picture else 0,), image), words[2]])
    grids = [(1, 4, 6)] if picture else []
    positions = [
        mrope(x.numpy(), image, np.array(g, np.int64).reshape(-1, 3)) for x, g in ((first, []), (second, grids))
    ]
    ids = torch.cat([first, second]).unsqueeze(0)
    labels = ids.roll(-1, 1)
    labels[:, [*range(4), len(first) - 1, *range(len(first), ids.shape[1] - 5), ids.shape[1] - 1]] = -100
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids_T": ids,
        "position_ids_4T": torch.cat([torch.as_tensor(p) for p in positions], dim=-1).unsqueeze(1),
        "labels_T": labels,
        "cu_seqlens": torch.tensor([0, len(first), ids.shape[1]], dtype=torch.int32),
        "max_seqlen": max(len(first), len(second)),
        "pixel_values": torch.randn(24, width, generator=generator) if picture else None,
        "image_grid_thw": torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
    }


def _check_family(cls: type[Strategy], base: Path, result: Path, options: dict[str, Any]) -> None:
    source = source_of(open_checkpoint(str(base)), "no", torch.device("cpu"))
    config = cls.Config(**options)
    strategy = cls(config)  # type: ignore[call-arg]
    torch.manual_seed(0)
    model = strategy.prepare_model(source)
    groups = strategy.param_groups(model)
    promised = config.rates()
    check_groups(model, groups, cls.__name__, source.parts, promised, source.tied_head)
    cast(model, source.compute_dtype)
    packed = PackedVLM(model, source.parts, source.config.image_token_id)
    optimizer = build_optimizer(model, groups, dict.fromkeys(promised, 1e-2), 0.0)
    proof = Proof(model, groups)
    packed.train()
    for step in range(1, 3):
        packed(**example_row(source, seed=step)).sum().backward()
        proof.before_update(reached_pictures=True)
        optimizer.step()
        optimizer.zero_grad()
        proof.after_update(step)
    _check_result(strategy, source, packed, result)


@torch.no_grad()
def _losses(packed: PackedVLM, source: Source) -> Tensor:
    packed.eval()
    found = packed(**example_row(source, seed=9))
    assert isinstance(found, Tensor)
    return found


def _check_result(strategy: Strategy, source: Source, packed: PackedVLM, result: Path) -> None:
    model = packed.model
    names = needed(strategy, model, source)
    whole_weights = {n: p.detach().clone() for n, p in model.named_parameters() if n in names}
    save_result(strategy, model, source, whole_weights, result, min_pixels=3136, max_pixels=1003520, facts={})
    if isinstance(strategy, Exporter):
        whole = strategy.merge(result, str(source.checkpoint.folder))
    elif (result / "adapter_config.json").exists():
        whole = merged(result)
    else:
        whole = load_hf(result, "cpu")
    expected = _losses(packed, source)
    found = _losses(PackedVLM(base_model(whole), source.parts, source.config.image_token_id), source)
    worst = float((expected - found).abs().max())
    if not worst < 1e-4:
        raise StrategyError(
            f"{type(strategy).__name__} on {source.checkpoint.family.title}: the saved and merged model's losses "
            f"differ from the trained model's by {worst:.2g} (allowed: 1e-4)."
        )
