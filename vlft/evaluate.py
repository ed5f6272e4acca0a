"""Held-out loss for each dataset, and generated answers for the metrics that were asked for; on all ranks.

`evaluate` is the whole of it, for a run and for `vlft eval`.

Every held-out sample is used exactly once. Sums travel, not averages, so the result does not depend on the ranks.

T tokens of a row, B samples, S supervised tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vlft.allocator import shortage
from vlft.data.collate import Row
from vlft.data.prepare import Data
from vlft.data.show import Described, last_answer
from vlft.engine import Engine
from vlft.errors import ConfigError, DeviceMemoryError
from vlft.metrics import Metric, Prediction
from vlft.models.attention import plain_attention
from vlft.models.forward import base_model

Inputs = Callable[[Row, bool], dict[str, Any]]
"""(row, training) -> keyword arguments of the packed forward."""
Describe = Callable[[int], Described]
Scores = dict[str, float]


@dataclass(frozen=True)
class Answers:
    """How answers are generated."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: greedy."""
    seed: int = 0
    """Of sampling; the same answer needs the same batches, too."""


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found; the same on all ranks."""

    values: dict[str, float | None]
    """By the keys of metrics.jsonl."""
    made: dict[str, list[Prediction]]
    """The answers, by data set."""
    failed: dict[str, str]
    """Errors of scripts that could not score them, by "<dataset>/<script>"."""


def evaluate(
    engine: Engine,
    packed: nn.Module,
    model: nn.Module,
    held_out: Callable[[Sequence[str], int | None], Iterable[Row]],
    inputs: Inputs,
    data: Data,
    scripts: Mapping[str, Mapping[str, Metric]],
    answers: Answers,
) -> Evaluation:
    """Losses of all held-out samples, answers to those of `scripts`, and the scripts' scores.

    Args:
        packed: the module that gives losses; `model`: the one inside it, which generates. Both in eval mode.
        held_out: (datasets, limit) -> this rank's rows.
        scripts: by data set; the functions are needed on the main process only.
    """
    made: dict[str, list[Prediction]] = {}
    failed: dict[str, str] = {}
    names = data.eval_datasets
    with engine.autocast():
        values = held_out_loss(engine, packed, held_out(names, None), inputs, data.dataset_of, names)
        for dataset in scripts:
            rows = held_out([dataset], data.options.eval_limit)
            made[dataset] = predictions(engine, model, rows, inputs, data.chat.tokenizer, data.describe, answers)
    for dataset, metrics in scripts.items():
        # Once: a script may ask a judge that costs money.
        scores, errors = engine.on_main(partial(score, dataset, made[dataset], metrics))
        values |= scores
        failed |= errors
    return Evaluation(values, made, failed)


def does_not_fit(error: torch.OutOfMemoryError) -> DeviceMemoryError:
    return DeviceMemoryError(
        f"the model and one batch of an evaluation do not fit into this device ({shortage(error)}); lower "
        "--per_device_eval_batch_size, --eval_max_new_tokens or --max_pixels."
    )


_WRONG = ("", "no idea", "{[1, 2")
"""Answers that a script must live with."""


@torch.no_grad()
def held_out_loss(
    engine: Engine,
    model: nn.Module,
    rows: Iterable[Row],
    inputs: Inputs,
    dataset_of: Callable[[int], str],
    names: Sequence[str],
) -> dict[str, float | None]:
    """Mean loss over the supervised tokens of each dataset, as "eval/<dataset>/loss"; None where it is not finite."""
    sums, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    for row in rows:
        losses_S = model(**inputs(row, False)).double().cpu()
        for sample, loss in zip(row.sample_of_supervised().tolist(), losses_S.tolist(), strict=True):
            name = dataset_of(row.sample_ids[sample])
            sums[name] += loss
            counts[name] += 1
    total = engine.sums([sums[n] for n in names] + [float(counts[n]) for n in names])
    half = len(names)
    means = {f"eval/{n}/loss": total[i] / total[half + i] for i, n in enumerate(names) if total[half + i]}
    return {key: mean if math.isfinite(mean) else None for key, mean in means.items()}


def _prompts(row: Row) -> list[tuple[int, Tensor]]:
    """(index in the row, tokens before the last answer) of each sample that has one."""
    found = []
    for i, (start, end) in enumerate(pairwise(row.cu_seqlens.tolist())):
        first, _ = last_answer(row.labels_T[0, start:end].cpu().numpy())
        if first:
            found.append((i, row.input_ids_T[0, start : start + first].cpu()))
    return found


def pictures_of(
    row: Row, prompts: Sequence[tuple[int, Tensor]], pixel_values: Tensor | None, vision: Any, image_token_id: int
) -> dict[str, Tensor]:
    """`pixel_values` and `image_grid_thw` of the pictures whose tokens lie in the prompts; nothing without any.

    A picture after the last learnt answer is in the row and in no prompt.

    Args:
        prompts: (index in the row, the first tokens of that sample).
        pixel_values: of the whole row, (P, ...).
    """
    patches_I = row.image_grid_thw.prod(dim=1)
    kept_I = torch.zeros(len(patches_I), dtype=torch.bool)
    for i, ids in prompts:
        left = int((ids == image_token_id).sum()) * vision.spatial_merge_size**2
        for k in (row.image_sample == i).nonzero().flatten().tolist():
            kept_I[k] = left > 0
            left -= int(patches_I[k])
    if pixel_values is None or not kept_I.any():
        return {}
    kept_P = torch.repeat_interleave(kept_I, patches_I).to(pixel_values.device)
    return {"pixel_values": pixel_values[kept_P], "image_grid_thw": row.image_grid_thw[kept_I].to(pixel_values.device)}


def _left_padded(prompts: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = prompt, 1
    return ids, mask


def _blank_picture(vision: Any, device: torch.device) -> dict[str, Tensor]:
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    side = vision.spatial_merge_size
    grid = torch.tensor([[1, side, side]], device=device)
    return {"pixel_values": torch.zeros(side * side, width, device=device), "image_grid_thw": grid}


def decoding(temperature: float) -> dict[str, Any]:
    """Arguments of `generate` for an evaluation and for a chat, without what a folder's generation_config.json adds.

    Greedy is the likeliest token and nothing else: a repetition penalty would count the padding of a batch, so that an
    answer depended on its neighbours.
    """
    if not temperature:
        plain = dict.fromkeys(("temperature", "top_p", "top_k"))
        return {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, **plain}
    # Alone: with the checkpoint's top_k of 1, say, no temperature would change anything.
    alone = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    return {"do_sample": True, "num_beams": 1, "temperature": temperature, **alone}


@torch.no_grad()
def generate(
    model: nn.Module, row: Row, inputs: Inputs, tokenizer: Any, answers: Answers, *, together: bool = False
) -> list[tuple[int, str]]:
    """Answers to the last question of each sample: (sample, text).

    Args:
        model: the prepared model itself, not the packed wrapper.
        together: every rank runs as many forwards as the longest answer of all needs, and one that has no question runs
            them too: where weights are sharded, all must call every layer alike.
    """
    prompts = _prompts(row)
    if not prompts and not together:
        return []
    asked = [p for _, p in prompts]
    hf: Any = base_model(model)
    device = next(hf.parameters()).device
    pixels, vision = inputs(row, False)["pixel_values"], hf.config.vision_config
    pictures = pictures_of(row, prompts, pixels, vision, hf.config.image_token_id)
    if not pictures and together:
        # The other ranks' prompts may hold pictures: a blank one of one token calls the vision tower here too.
        asked.append(torch.tensor([hf.config.image_token_id]))
        pictures = _blank_picture(vision, device)
    ids, mask = _left_padded(asked, tokenizer.pad_token_id)
    if answers.temperature:
        torch.manual_seed(answers.seed + sum(row.sample_ids))
    with plain_attention(hf):
        out = hf.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            mm_token_type_ids=(ids == hf.config.image_token_id).int().to(device),
            **pictures,
            max_new_tokens=answers.max_new_tokens,
            synced_gpus=together,
            pad_token_id=tokenizer.pad_token_id,
            **decoding(answers.temperature),
        )
    # Stale deltas would shift the positions of the next forward.
    hf.model.rope_deltas = None
    texts = tokenizer.batch_decode(out[: len(prompts), ids.shape[1] :].cpu(), skip_special_tokens=True)
    return [(row.sample_ids[i], text) for (i, _), text in zip(prompts, texts, strict=False)]


def predictions(
    engine: Engine,
    model: nn.Module,
    rows: Iterable[Row],
    inputs: Inputs,
    tokenizer: Any,
    describe: Describe,
    answers: Answers,
) -> list[Prediction]:
    """Answers of all ranks, in the order of the samples, on all ranks."""
    found: list[tuple[int, str]] = []
    together = engine.shards_weights and engine.world_size > 1
    with engine.generating():
        for row in rows:
            found += generate(model, row, inputs, tokenizer, answers, together=together)
    return [as_prediction(describe(sample), text) for sample, text in sorted(engine.gather(found))]


def as_prediction(about: Described, text: str) -> Prediction:
    return Prediction(about.id, about.question, text, about.reference, about.images, about.record, about.sizes)


def score(dataset: str, made: Sequence[Prediction], metrics: Mapping[str, Metric]) -> tuple[Scores, dict[str, str]]:
    """Scores by "eval/<dataset>/<script>/<metric>", and the errors of scripts that fail by "<dataset>/<script>"."""
    scores: Scores = {}
    failed: dict[str, str] = {}
    for stem, metric in metrics.items():
        try:
            scores |= {f"eval/{dataset}/{stem}/{name}": value for name, value in _checked(metric(made)).items()}
        # Whatever a user's file raises is told the same way; sys.exit() there would end the run in silence.
        except (Exception, SystemExit) as error:
            failed[f"{dataset}/{stem}"] = f"{type(error).__name__}: {str(error)[:200]}"
    return scores, failed


def _checked(found: Any) -> Scores:
    """Raises: TypeError, ValueError if these are not finite numbers by name."""
    if not isinstance(found, Mapping):
        raise TypeError(f"it answered {type(found).__name__}, not a dict of numbers by name")
    values = {str(name): float(value) for name, value in found.items()}
    if odd := [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]:
        raise ValueError(f"it answered {', '.join(odd)}, which is no finite number")
    return values


def rehearse(dataset: str, some: Sequence[Described], metrics: Mapping[str, Metric]) -> set[str]:
    """Score made-up answers of real samples, right and wrong ones: a broken script ends here and not after hours.

    Returns:
        The keys that `score` will give.
    Raises:
        ConfigError: all the scripts that fail.
    """
    keys: set[str] = set()
    problems: dict[str, str] = {}
    right = [as_prediction(about, about.reference) for about in some]
    wrong = [as_prediction(about, text) for about, text in zip(some, cycle(_WRONG), strict=False)]
    for made in (right, wrong, right[:1]):
        scores, failed = score(dataset, made, metrics)
        keys |= scores.keys()
        problems |= failed
    if problems:
        raise ConfigError(
            [
                f"--eval_dataset_scripts {name.replace('/', ': ', 1)} failed on answers made up for a trial: {error}; "
                "correct it."
                for name, error in problems.items()
            ]
        )
    return keys
