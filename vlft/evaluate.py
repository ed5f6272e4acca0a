"""Held-out loss for each dataset, and generated answers for the metrics that were asked for; on all ranks.

Every held-out sample is used exactly once. Sums travel, not averages, so the result does not depend on the ranks.

T tokens of a row, B samples, S supervised tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vlft.data.collate import Row
from vlft.data.prepare import Described
from vlft.engine import Engine
from vlft.errors import ConfigError
from vlft.metrics import Metric, Prediction
from vlft.models.attention import plain_attention
from vlft.models.forward import IGNORE, base_model

Inputs = Callable[[Row, bool], dict[str, Any]]
"""(row, training) -> keyword arguments of the packed forward."""
Describe = Callable[[int], Described]


@torch.no_grad()
def held_out_loss(
    engine: Engine,
    model: nn.Module,
    rows: Iterable[Row],
    inputs: Inputs,
    dataset_of: Callable[[int], str],
    names: Sequence[str],
) -> dict[str, float]:
    """Mean loss over the supervised tokens of each dataset, as "eval/<dataset>/loss"."""
    sums, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    for row in rows:
        losses_S = model(**inputs(row, False)).double().cpu()
        for sample, loss in zip(row.sample_of_supervised().tolist(), losses_S.tolist(), strict=True):
            name = dataset_of(row.sample_ids[sample])
            sums[name] += loss
            counts[name] += 1
    total = engine.sums([sums[n] for n in names] + [float(counts[n]) for n in names])
    half = len(names)
    return {f"eval/{n}/loss": total[i] / total[half + i] for i, n in enumerate(names) if total[half + i]}


def _last_answer(labels_T: Tensor) -> tuple[int, int]:
    """[start, end) of the last supervised run of tokens; labels are shifted, so the token of label t is t + 1."""
    places = (labels_T != IGNORE).nonzero().flatten().tolist()
    start = end = places[-1]
    while start - 1 in places:
        start -= 1
    return start + 1, end + 2


def _prompts(row: Row) -> list[tuple[int, Tensor, Tensor]]:
    """(index in the row, prompt tokens, reference tokens) of each sample."""
    found = []
    borders = row.cu_seqlens.tolist()
    for i, (start, end) in enumerate(pairwise(borders)):
        ids, labels = row.input_ids_T[0, start:end].cpu(), row.labels_T[0, start:end].cpu()
        if bool((labels != IGNORE).any()):
            first, last = _last_answer(labels)
            found.append((i, ids[:first], ids[first:last]))
    return found


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


@torch.no_grad()
def generate(
    model: nn.Module, row: Row, inputs: Inputs, tokenizer: Any, max_new_tokens: int, *, together: bool = False
) -> list[tuple[int, str, str]]:
    """Greedy answers to the last question of each sample: (sample, prediction, reference).

    Args:
        model: the prepared model itself, not the packed wrapper.
        together: every rank runs as many forwards as the longest answer of all needs, and one that has no question runs
            them too: where weights are sharded, all must call every layer alike.
    """
    prompts = _prompts(row)
    if not prompts and not together:
        return []
    asked = [p for _, p, _ in prompts]
    hf: Any = base_model(model)
    device = next(hf.parameters()).device
    packed = inputs(row, False)
    pictures = {}
    if packed["pixel_values"] is not None:
        pictures = {"pixel_values": packed["pixel_values"], "image_grid_thw": row.image_grid_thw.to(device)}
    elif together:
        # The other ranks' prompts may hold pictures: a blank one of one token calls the vision tower here too.
        asked.append(torch.tensor([hf.config.image_token_id]))
        pictures = _blank_picture(hf.config.vision_config, device)
    ids, mask = _left_padded(asked, tokenizer.pad_token_id)
    with plain_attention(hf):
        out = hf.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            mm_token_type_ids=(ids == hf.config.image_token_id).int().to(device),
            **pictures,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            synced_gpus=together,
            pad_token_id=tokenizer.pad_token_id,
        )
    # Stale deltas would shift the positions of the next forward.
    hf.model.rope_deltas = None
    if not prompts:
        return []
    texts = tokenizer.batch_decode(out[: len(prompts), ids.shape[1] :].cpu(), skip_special_tokens=True)
    references = tokenizer.batch_decode([r for _, _, r in prompts], skip_special_tokens=True)
    return [(row.sample_ids[i], t, r) for (i, _, _), t, r in zip(prompts, texts, references, strict=True)]


def predictions(
    engine: Engine,
    model: nn.Module,
    rows: Iterable[Row],
    inputs: Inputs,
    tokenizer: Any,
    describe: Describe,
    max_new_tokens: int = 256,
) -> list[Prediction]:
    """Answers of all ranks, in the order of the samples."""
    found: list[tuple[int, str, str]] = []
    together = engine.shards_weights and engine.world_size > 1
    with engine.generating():
        for row in rows:
            found += generate(model, row, inputs, tokenizer, max_new_tokens, together=together)
    made = []
    for sample, text, reference in sorted(engine.gather(found)):
        about = describe(sample)
        made.append(Prediction(about.id, about.question, text, reference, about.images, about.record))
    return made


def score(dataset: str, made: Sequence[Prediction], metrics: Mapping[str, Metric]) -> dict[str, float]:
    """ "eval/<dataset>/<script>/<metric>" of every script.

    Raises:
        ConfigError: a script fails, or answers something else than numbers by name.
    """
    scores: dict[str, float] = {}
    for stem, metric in metrics.items():
        try:
            scores |= {f"eval/{dataset}/{stem}/{name}": float(value) for name, value in metric(made).items()}
        except Exception as error:  # whatever a user's file raises is told the same way
            raise ConfigError(
                f"--eval_dataset_scripts: {stem} failed on {len(made)} answers of {dataset}: {type(error).__name__}: "
                f"{str(error)[:200]}; correct it and go on with --resume_from_checkpoint latest."
            ) from error
    return scores
