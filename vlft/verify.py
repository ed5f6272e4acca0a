"""`vlft verify`: does what will be served say what was trained? Logits and greedy answers on the run's own samples.

Models, one in memory at a time:

    trained    run.yaml's strategy and base with a checkpoint's weights, through training's packed forward
    rounded    the same, its adapters merged, in the 16 bits that the result is stored in
    base       what training began with: how far it is from `trained` is what the comparison must be able to see
    merged     the result as a whole model (an adapter is merged in memory), through the same forward
    reloaded   the result as its user loads it, through transformers' (and PEFT's) own forward and positions

S supervised tokens, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlft import checkpoint as checkpoints
from vlft import export
from vlft.batch import ToInputs
from vlft.data.collate import Row
from vlft.data.loader import eval_steps
from vlft.data.prepare import Data, prepare_data
from vlft.data.show import last_answer
from vlft.errors import CheckpointError, ConfigError, DataError, MismatchError
from vlft.evaluate import pictures_of
from vlft.models.attention import plain_attention
from vlft.models.forward import IGNORE, PackedVLM, base_model
from vlft.models.load import META, load_config, open_checkpoint, read_json, resolve_folder, weights_dtype
from vlft.rebuild import Rebuilt, is_run, rebuild
from vlft.setup import data_options
from vlft.strategy import Exporter
from vlft.terminal import table
from vlft.tracking import RunFolder

MOST_TOKENS = 512
"""Supervised tokens of a sample that are compared: 152,000 logits each."""


@dataclass(frozen=True)
class Tolerance:
    """What may differ, as parts of the logits' standard deviation."""

    largest: float
    mean: float
    answers: bool
    """Greedy answers must be equal, too."""

    def __str__(self) -> str:
        return f"largest {self.largest:g}, mean {self.mean:g}" + (", all answers" if self.answers else "")


EXACT = Tolerance(1e-3, 1e-4, answers=True)
"""fp32 on both sides. Orders of summation (packed or padded, adapter beside its layer or merged) differ by about 1e-5;
a weight that is missing or of another step by 1e-2 and more."""
ROUNDED = Tolerance(0.25, 0.025, answers=False)
"""Where one side computes or is stored in 16 bits (8 significant bits in bf16). Rounding alone was measured at up to
0.11 and 0.02 (random models of 3 and of 28 layers, bf16 against fp32, adapters merged in bf16). It lets tokens that lie
closer than that change places, from where on greedy answers go apart, so they are shown and not judged. A difference
below these limits cannot be told from rounding."""
STORED = Tolerance(0.05, 0.005, answers=False)
"""The same forward in the same 16 bits on both sides: the weights differ by how merging rounds, mostly not at all."""
CLEARLY = 0.25
"""The result must be nearer to what was trained than this part of the base's distance."""


@dataclass(frozen=True)
class Said:
    """What one model says of all samples."""

    name: str
    logits: list[Tensor]
    """(S, V) fp32 for each sample, at the supervised tokens."""
    answers: list[list[int]]
    """Greedy tokens after each sample's last question."""
    exact: bool
    """Everything was stored and computed in fp32 (or more)."""
    way: str = ""
    """How it was computed, where another model that was computed so may be compared closely."""


@dataclass(frozen=True)
class Gap:
    """How far two models are from each other."""

    pair: str
    largest: float
    """Largest difference of two logits, in the first one's standard deviations."""
    mean: float
    same_top: float
    """Part of the tokens whose most likely successor is the same."""
    same_answers: int
    samples: int
    tolerance: Tolerance

    @property
    def holds(self) -> bool:
        t = self.tolerance
        close = self.largest <= t.largest and self.mean <= t.mean  # false for NaN, too
        return close and (self.same_answers == self.samples or not t.answers)


def verify(model: str, run: Path, samples: int = 8, max_new_tokens: int = 32) -> str:
    """Compare a result with the run that it came from; the table as text.

    Raises:
        MismatchError: they differ by more than the tolerance, or whether they do cannot be told; the message holds the
            table.
        ConfigError: `run` is no run folder.
        CheckpointError: the run has no checkpoint left to compare with.
        ModelError: the model cannot be loaded.
    """
    gaps, step, moved = compare(model, run, samples, max_new_tokens)
    head = ("pair", "largest", "mean", "same top token", "same answers", "")
    rows = [
        (g.pair, f"{g.largest:.1e}", f"{g.mean:.1e}", f"{g.same_top:.1%}", f"{g.same_answers} of {g.samples}",
         "equal" if g.holds else "DIFFER")
        for g in gaps
    ]  # fmt: skip
    rows.append((moved.pair, f"{moved.largest:.1e}", f"{moved.mean:.1e}", f"{moved.same_top:.1%}",
                 f"{moved.same_answers} of {moved.samples}", "trained"))  # fmt: skip
    shown = f"{table(head, rows)}\ndifferences of logits, in their standard deviations; equal means: {_limits(gaps)}."
    indented = shown.replace("\n", "\n ")
    if bad := [g.pair for g in gaps if not g.holds]:
        raise MismatchError(
            f"{model} does not say what step {step} of {run} says ({', '.join(bad)}); export or merge it again, and "
            f"look for a base or a checkpoint that has changed since.\n {indented}"
        )
    if not told(gaps, moved):
        raise MismatchError(
            f"whether {model} says what step {step} of {run} says cannot be told: it is about as far from what was "
            f"trained as the untrained base is, and both are within rounding; train further, or export with --dtype "
            f"float32 and verify that.\n {indented}"
        )
    return f"{shown}\n{model} says what step {step} of {run} says."


def _limits(gaps: list[Gap]) -> str:
    """Those of most pairs, then those of each other one with its name."""
    ((usual, _),) = Counter(g.tolerance for g in gaps).most_common(1)
    others = [f"for {g.pair}: {g.tolerance}" for g in gaps if g.tolerance != usual]
    return "; ".join([str(usual), *others])


def told(gaps: list[Gap], moved: Gap) -> bool:
    """Whether the result, merged or as its user loads it, is clearly nearer to what was trained than the base is."""
    name = moved.pair.split(" - ")[0]
    pairs = [f"{name} - {other}" for other in ("merged", "whole", "reloaded")]
    return min(g.mean for g in gaps if g.pair in pairs) <= CLEARLY * moved.mean


def compare(model: str, run: Path, samples: int = 8, max_new_tokens: int = 32) -> tuple[list[Gap], int, Gap]:
    """The gaps between the trained model, the result merged, and the result reloaded; the step of the first; and how
    far it is from the base."""
    if not is_run(run):
        raise ConfigError(f"--against {run} is no run folder (no run.yaml); give the run's output_dir.")
    folder = open_checkpoint(model).folder
    checkpoint = _checkpoint_for(folder, RunFolder(run))
    trained = rebuild(run, checkpoint)
    rows, data = _rows(trained, samples)
    ask = _Asker(trained, rows, data, max_new_tokens)
    dtype = stored_dtype(folder)
    said = [ask("trained", trained.model, packed=True, autocast=True)]
    step = int(trained.state["step"])
    if (closer := _rounded(trained, dtype)) is not None:
        said.append(ask("rounded", closer, packed=True))
    rounds = closer is not None
    del trained, closer
    untrained = rebuild(run, checkpoint, untrained=True)
    before = (_rounded(untrained, dtype) if rounds else None) or untrained.model
    moved = gap(said[-1], ask("base", before, packed=True, autocast=not rounds))
    del untrained, before
    device = str(ask.device)
    if open_checkpoint(model).is_adapter:
        said.append(ask("merged", export.merged(folder, "trained", device), packed=True))
        if (again := export.reloaded(folder, device)) is not None:
            said.append(ask("reloaded", again, packed=False))
    else:
        whole = export.reloaded(folder, device)
        assert whole is not None
        said += [ask("whole", whole, packed=True), ask("reloaded", whole, packed=False)]
    return [gap(a, b) for a, b in combinations(said, 2)], step, moved


def _checkpoint_for(result: Path, run: RunFolder) -> str:
    """The step whose weights the result says it has; the newest where it does not say.

    Raises:
        CheckpointError: the run no longer has that checkpoint.
    """
    facts = read_json(result / META).get("run") if (result / META).exists() else None
    step = facts.get("step") if isinstance(facts, dict) else None
    if not isinstance(step, int) or step <= 0:
        return "latest"
    wanted, there = checkpoints.step_folder(run.checkpoints, step), checkpoints.complete(run.checkpoints)
    if wanted not in there:
        found = f"it has {', '.join(path.name for path in there)}" if there else "it has none"
        raise CheckpointError(
            f"{result} is of step {step}, and {run.checkpoints} no longer has {wanted.name} ({found}); verify what "
            f"'vlft export {run.root} --checkpoint NAME' writes of one that is there, or keep more (save_total_limit)."
        )
    return wanted.name


def stored_dtype(result: Path) -> torch.dtype:
    """Of a result's weights as a whole model."""
    found = open_checkpoint(str(result))
    folder = found.folder
    if found.adapter is not None:
        folder = resolve_folder(str(found.adapter["base_model_name_or_path"]))
    return weights_dtype(load_config(replace(found, folder=folder)))


def _rounded(trained: Rebuilt, dtype: torch.dtype) -> nn.Module | None:
    """The model with its adapters merged, in the 16 bits of the result; it takes the place of `trained.model`.

    None where this would not give the result's own weights: nothing is rounded, the base is in 4 bits or in another
    dtype, or the strategy has a format of its own.
    """
    model: Any = trained.model
    held = {p.dtype for p in model.parameters()}
    packed = any(hasattr(p, "quant_state") for p in model.parameters())
    if dtype.itemsize != 2 or packed or not held <= {dtype, torch.float32, torch.float64}:
        return None
    if isinstance(trained.strategy, Exporter):
        return None
    whole = model.merge_and_unload(safe_merge=True) if hasattr(model, "peft_config") else model
    assert isinstance(whole, nn.Module)
    for p in whole.parameters():
        p.data = p.data.to(dtype)
    return whole


def gap(a: Said, b: Said) -> Gap:
    """Compare what two models say of the same samples."""
    one, other = torch.cat(a.logits), torch.cat(b.logits)
    differences = (one - other).abs() / one.std()
    return Gap(
        f"{a.name} - {b.name}", float(differences.max()), float(differences.mean()),
        float((one.argmax(-1) == other.argmax(-1)).float().mean()),
        sum(x == y for x, y in zip(a.answers, b.answers, strict=True)), len(a.answers),
        EXACT if a.exact and b.exact else STORED if a.way and a.way == b.way else ROUNDED,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Asking a model
# ---------------------------------------------------------------------------------------------------------------------


def _rows(trained: Rebuilt, samples: int) -> tuple[list[Row], Data]:
    """Rows of one sample each: held-out ones of every data set in turn, training samples where none is held out."""
    options = data_options(trained.run, trained.engine, trained.source.checkpoint, int(trained.state["global_batch"]))
    data = prepare_data(replace(options, eval_batch_size=1, num_workers=0, pin_memory=False, progress=False))
    names = data.eval_datasets
    if names:
        share = -(-samples // len(names))
        steps = (step for name in names for step in islice(data.eval_steps([name]), share))
    else:
        found = eval_steps(data.index, data.fitted, data.chat, data.plan.ids[:samples], rank=0, world_size=1)
        steps = (step for step in found)
    rows = [row for step in islice(steps, samples) for row in step.rows if row.sample_ids and row.supervised]
    if not rows:
        raise DataError(f"none of {samples} samples of {trained.folder.root} can be read; see its ledger.jsonl.")
    return rows, data


class _Asker:
    """Shows the same samples to one model after another."""

    def __init__(self, trained: Rebuilt, rows: list[Row], data: Data, max_new_tokens: int) -> None:
        self.engine, self.source, self.rows = trained.engine, trained.source, rows
        self.device, self.max_new_tokens = trained.engine.device, max_new_tokens
        self.inputs = ToInputs(trained.source.checkpoint.pictures, None, self.device)
        self.pad = data.chat.pad_token_id

    @torch.no_grad()
    def __call__(self, name: str, model: nn.Module, *, packed: bool, autocast: bool = False) -> Said:
        model.eval()
        hf: Any = base_model(model)
        exact = all(p.dtype in (torch.float32, torch.float64) for p in hf.parameters() if p.is_floating_point())
        exact &= not autocast or self.source.compute_dtype in (torch.float32, torch.float64)
        logits, answers = [], []
        with self.engine.autocast() if autocast else nullcontext():
            wrapped = PackedVLM(model, self.source.parts, self.source.config.image_token_id) if packed else None
            with nullcontext() if packed else plain_attention(hf):
                for row in self.rows:
                    found = self._packed(wrapped, row) if wrapped else self._plain(model, row)
                    logits.append(found[:MOST_TOKENS].float().cpu())
                    answers.append(self._answer(hf, row))
        dtypes = {str(p.dtype) for p in hf.parameters()}
        return Said(name, logits, answers, exact, dtypes.pop() if packed and not autocast and len(dtypes) == 1 else "")

    def _packed(self, wrapped: PackedVLM, row: Row) -> Tensor:
        """(S, V): what the head gives in training's own forward."""
        with _outputs_of(base_model(wrapped.model).get_submodule(self.source.parts.head)) as seen:
            wrapped(**self.inputs(row, False))
        return seen[-1]

    def _plain(self, model: Any, row: Row) -> Tensor:
        """(S, V) of transformers' forward, which finds the positions itself."""
        found = model(**self._arguments(row, row.input_ids_T[0]), use_cache=False).logits[0]
        base_model(model).model.rope_deltas = None  # type: ignore[union-attr]
        logits_SV: Tensor = found[(row.labels_T[0] != IGNORE).to(found.device)]
        return logits_SV

    def _arguments(self, row: Row, ids_T: Tensor) -> dict[str, Any]:
        """Keyword arguments of transformers' forward for the first tokens of a row of one sample."""
        ids = ids_T[None].to(self.device)
        pixels, config = self.inputs(row, False)["pixel_values"], self.source.config
        pictures = pictures_of(row, [(0, ids_T)], pixels, config.vision_config, config.image_token_id)
        return {
            "input_ids": ids, "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self.source.config.image_token_id).int(),
            **pictures,
        }  # fmt: skip

    def _answer(self, hf: Any, row: Row) -> list[int]:
        """Greedy tokens after the last question, without what generation_config.json may add."""
        from transformers import GenerationConfig

        start, _ = last_answer(row.labels_T[0].numpy())
        config = GenerationConfig(
            do_sample=False, max_new_tokens=self.max_new_tokens, pad_token_id=self.pad,
            eos_token_id=hf.generation_config.eos_token_id,
        )  # fmt: skip
        with plain_attention(hf):
            out = hf.generate(**self._arguments(row, row.input_ids_T[0, :start]), generation_config=config)
        hf.model.rope_deltas = None  # stale ones would shift the positions of the next forward
        found: list[int] = out[0, start:].tolist()
        return found


@contextmanager
def _outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _arguments, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()
