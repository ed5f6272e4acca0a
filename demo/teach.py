"""How the base model learns: first its vision tower to look, then its language model to talk about what it sees.

Learning both from answers alone takes hours on a CPU: an answer is one word, and a tower that has never seen a shape
has to guess what the word is about. The drawing knows what lies on every image token: sixteen lessons a picture.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from demo import draw

PATCH, MERGE = 14, 2
CELL = PATCH * MERGE  # pixels of a side of one image token
IMAGE_TOKENS = (draw.SIDE // CELL) ** 2
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, as every Qwen2-VL uses them
STD = (0.26862954, 0.26130258, 0.27577711)
RAYS = 16  # directions in which the outline of a thing is measured
NOBODY_KNOWS = -100


def patches(pictures: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> (B * 64, 1176): Qwen's patch order, the four of one token side by side, the frame twice."""
    x = (pictures.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    cells = draw.SIDE // CELL
    x = x.permute(0, 3, 1, 2).reshape(-1, 3, cells, MERGE, PATCH, cells, MERGE, PATCH)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)  # B, row, column, the same two within a token, channel, 1, h, w
    return x.expand(*x.shape[:6], 2, PATCH, PATCH).reshape(-1, 3 * 2 * PATCH * PATCH)


def stacked(pictures: list[Any]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))


def grid(size: int) -> Tensor:
    return torch.tensor([[1, draw.SIDE // PATCH, draw.SIDE // PATCH]] * size)


def equal_windows() -> str:
    """Attention for pictures of one size: all windows of a layer in one call, where transformers makes one call each.

    The name has "flash" in it because transformers hands over the borders (`cu_seq_lens`) only to such a name.
    """
    from transformers import AttentionInterface

    def attend(_module: Any, q: Any, k: Any, v: Any, _mask: Any = None, **borders: Any) -> tuple[Tensor, None]:
        window = int(borders["max_length_q"])
        heads, width = q.shape[1], q.shape[3]
        # (1, heads, all patches, width) -> (windows, heads, patches of one, width)
        parts = (x[0].reshape(heads, -1, window, width).transpose(0, 1) for x in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(*parts)
        return out.transpose(1, 2).reshape(1, -1, heads, width), None

    AttentionInterface.register("flash_of_equal_windows", attend)
    return "flash_of_equal_windows"


def fit(weights: list[nn.Parameter], loss_of: Callable[[], Tensor], steps: int, rate: float) -> None:
    """AdamW, a short warmup, cosine to zero."""
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.02, betas=(0.9, 0.95))
    begun, recent = time.perf_counter(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent += loss.item() / 100
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}  loss {recent:.4f}  {time.perf_counter() - begun:.0f} s", flush=True)
            recent = 0.0


# ---------------------------------------------------------------- looking


def measures(thing: draw.Thing) -> list[float]:
    """What there is to see of a thing, named or not, each of about unit size: outline, size, colour and centre."""
    corners = thing.corners
    ends = np.roll(corners, -1, axis=0)
    along = np.linspace(0, 1, 12, endpoint=False)[:, None, None]
    border = (corners + along * (ends - corners)).reshape(-1, 2)
    ray = ((np.arctan2(border[:, 1], border[:, 0]) / (2 * math.pi) % 1) * RAYS).astype(int) % RAYS
    reach = np.full(RAYS, 0.8)
    far = np.hypot(border[:, 0], border[:, 1]) / thing.radius
    for k in set(ray.tolist()):
        reach[k] = far[ray == k].max()
    colour = [(c / 255 - 0.5) / 0.3 for c in draw.rgb(thing.colour)]
    return [*((reach - 0.8) / 0.2), (thing.radius - 17) / 5, *colour, thing.x / CELL - 2, thing.y / CELL - 2]


def lessons(things: list[draw.Thing]) -> tuple[list[int], list[list[float]]]:
    """For each image token: what lies on it, by number (0: bare paper, 1: no name, from 2: the shapes of the base, and
    nobody knows at an edge), and its measures, the centre also as seen from the token."""
    measured = [measures(thing) for thing in things]
    names, rows = [], []
    for y, x in product(range(CELL // 2, draw.SIDE, CELL), repeat=2):
        gap, k = min((math.hypot(t.x - x, t.y - y) - t.radius, k) for k, t in enumerate(things))
        shape = things[k].shape
        named = 2 + draw.BASE_SHAPES.index(shape) if shape in draw.BASE_SHAPES else 1
        names.append(named if gap < 6 else 0 if gap > 18 else NOBODY_KNOWS)
        rows.append([*measured[k], (things[k].x - x) / CELL, (things[k].y - y) / CELL])
    return names, rows


def learn_to_look(tower: Any, pictures: int, steps: int, size: int, rate: float) -> None:
    """The tower alone: what lies on each token, how it is outlined and coloured. The head is thrown away."""
    drawn = [draw.look_picture(seed) for seed in range(pictures)]
    taught = [lessons(things) for _, things in drawn]
    seen, names = stacked([picture for picture, _ in drawn]), torch.tensor([names for names, _ in taught])
    rows = torch.tensor([rows for _, rows in taught])
    kinds = 2 + len(draw.BASE_SHAPES)
    usual, tower.config._attn_implementation = tower.config._attn_implementation, equal_windows()
    head, rng = nn.Linear(tower.config.out_hidden_size, kinds + rows.shape[-1]), random.Random("looks")

    def loss() -> Tensor:
        chosen = [rng.randrange(pictures) for _ in range(size)]
        out = head(tower(patches(seen[chosen]), grid_thw=grid(size)).pooler_output)
        name, row = names[chosen].flatten(), rows[chosen].flatten(0, 1)
        apart = nn.functional.mse_loss(out[name > 0, kinds:], row[name > 0])
        return apart + nn.functional.cross_entropy(out[:, :kinds], name, ignore_index=NOBODY_KNOWS)

    fit([*tower.parameters(), *head.parameters()], loss, steps, rate)
    tower.config._attn_implementation = usual


# ---------------------------------------------------------------- talking


def encode(turns: list[draw.Turn], tokenizer: Any) -> tuple[list[int], list[int]]:
    """A conversation about one picture: token ids, and labels that are -100 on everything but answers and their end."""
    image = "<|vision_start|>" + "<|image_pad|>" * IMAGE_TOKENS + "<|vision_end|>"
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    ids: list[int] = tokenizer.encode(text)
    labels = [-100] * len(ids)
    for k, turn in enumerate(turns):
        head = "" if k == 0 else "\n"
        asked = f"{head}<|im_start|>user\n{image if k == 0 else ''}{turn.question}<|im_end|>\n<|im_start|>assistant\n"
        prompt, answer = tokenizer.encode(asked), tokenizer.encode(turn.answer + "<|im_end|>")
        ids += prompt + answer
        labels += [-100] * len(prompt) + answer
    return ids, labels


def positions(length: int, start: int) -> Tensor:
    """M-RoPE positions (3, length) of a row whose picture begins at `start`: here the same for every row."""
    side = draw.SIDE // CELL
    inside = torch.arange(IMAGE_TOKENS)
    image = torch.stack([torch.zeros_like(inside), inside // side, inside % side]) + start
    before = torch.arange(start).expand(3, -1)
    after = torch.arange(length - start - IMAGE_TOKENS).expand(3, -1) + start + side
    return torch.cat([before, image, after], dim=1)


def talk(turns: list[draw.Turn], rng: random.Random) -> list[draw.Turn]:
    """A few questions, then the description, which would give the answers away if it came earlier."""
    *questions, describe = turns
    return [*rng.sample(questions, rng.choice((0, 3, 4, 4))), describe]


def batch_of(talks: list[list[draw.Turn]], tokenizer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Padded ids and labels (B, T) and positions (3, T)."""
    rows = [encode(turns, tokenizer) for turns in talks]
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), -100)
    for k, (row, wanted) in enumerate(rows):
        ids[k, : len(row)], labels[k, : len(row)] = torch.tensor(row), torch.tensor(wanted)
    start = int((ids[0] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).nonzero()[0])
    return ids, labels, positions(longest, start)


@torch.no_grad()
def looked_at(tower: Any, pictures: Tensor) -> Tensor:
    """(pictures, tokens, width): what the tower makes of each picture, once."""
    parts = [tower(patches(x), grid_thw=grid(len(x))).pooler_output for x in pictures.split(100)]
    return torch.cat(parts).unflatten(0, (-1, IMAGE_TOKENS))


def learn_to_talk(model: Any, tokenizer: Any, pictures: int, steps: int, size: int, rate: float) -> None:
    """The language model alone, over what the tower sees: answer questions. Loss over the answers and their end."""
    drawn = [draw.base_picture(seed) for seed in range(pictures)]
    features = looked_at(model.model.visual, stacked([picture for picture, _ in drawn]))
    rng, talker, image = random.Random("talks"), model.model.language_model, model.config.image_token_id

    def loss() -> Tensor:
        chosen = [rng.randrange(pictures) for _ in range(size)]
        ids, labels, at = batch_of([talk(drawn[k][1], rng) for k in chosen], tokenizer)
        embeds = talker.embed_tokens(ids).masked_scatter((ids == image).unsqueeze(-1), features[chosen])
        at = at.unsqueeze(1).expand(3, size, -1)
        hidden = talker(inputs_embeds=embeds, position_ids=at).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        kept = wanted != -100
        return nn.functional.cross_entropy(model.lm_head(hidden[kept]), wanted[kept])

    fit([*talker.parameters(), *model.lm_head.parameters()], loss, steps, rate)
