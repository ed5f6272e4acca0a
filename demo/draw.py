"""Draws the pictures and asks the questions of the demo: a small world that a small model can learn in minutes.

There are two halves. The *base* half is what `demo/base` was trained on: four shapes and four colours by name, one to
three things in a picture, and nameless blobs that taught its vision tower to see outlines. The *new* half is what the
demo teaches: three more colours, and counting, among shapes that are partly new as well. The base knows the new words
(it was asked to repeat them), but not what they stand for.

Everything is a function of its seed.
"""

from __future__ import annotations

import colorsys
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 112  # pixels: 8 x 8 patches of 14, 16 image tokens, four attention windows
FINE = 4  # pictures are drawn this much larger, then reduced: smooth edges
BASE_SHAPES = ("circle", "square", "triangle", "ring")
NEW_SHAPES = ("star", "heart", "cross")
SHAPES = BASE_SHAPES + NEW_SHAPES
BASE_COLOURS = ("red", "green", "blue", "yellow")
NEW_COLOURS = ("purple", "orange", "pink")
RGB = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 98, 217),
    "yellow": (247, 214, 40),
    "purple": (124, 58, 190),
    "orange": (245, 130, 20),
    "pink": (250, 140, 195),
}
PLACES = ("top left", "top right", "bottom left", "bottom right")
COUNTS = (1, 2, 3, 4)  # things in a picture that the vision tower learns from
DEMO_COUNTS = (1, 2, 3)  # things in a picture of the demo
NEW_WORDS = NEW_SHAPES + NEW_COLOURS + PLACES + tuple(str(n) for n in range(1, 10))
KINDS = ("colour", "count")


@dataclass(frozen=True)
class Thing:
    """One drawn shape: centre and radius in pixels of the final picture, angle in radians."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def corners(self) -> np.ndarray:
        """(n, 2) its outline around its centre, in pixels, y downwards."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return self.radius * np.array(_outline(self.shape)) @ np.array([[cos, sin], [-sin, cos]])

    @property
    def place(self) -> str | None:
        """The quarter of the picture that it lies in, or None where an honest person would hesitate."""
        dx, dy = self.x - SIDE / 2, self.y - SIDE / 2
        if min(abs(dx), abs(dy)) < 9:
            return None
        return f"{'top' if dy < 0 else 'bottom'} {'left' if dx < 0 else 'right'}"


@dataclass(frozen=True)
class Turn:
    """One question about a picture and its answer."""

    kind: str
    question: str
    answer: str


# ---------------------------------------------------------------- painting


def _outline(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape of radius 1 around (0, 0), y downwards."""

    if shape.startswith("blob"):
        return _blob(random.Random(shape))

    def ring(n: int, radii: tuple[float, ...]) -> list[tuple[float, float]]:
        turns = [2 * math.pi * k / n - math.pi / 2 for k in range(n)]
        return [(radii[k % len(radii)] * math.cos(a), radii[k % len(radii)] * math.sin(a)) for k, a in enumerate(turns)]

    if shape == "circle":
        return ring(48, (0.92,))
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "triangle":
        return ring(3, (1.1,))
    if shape == "star":
        return ring(10, (1.15, 0.48))
    if shape == "cross":
        return [(sx * a, sy * b) for sx, sy, a, b in _CROSS]
    if shape == "ring":  # around the outside, across, back around the hole
        outside = [*ring(48, (0.98,)), ring(48, (0.98,))[0]]
        return outside + [(0.5 * x, 0.5 * y) for x, y in reversed(outside)]
    if shape == "heart":
        points = [2 * math.pi * k / 48 for k in range(48)]
        bow = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in points]
        return [(math.sin(t) ** 3 * 1.05, -(b + 2.5) / 14) for t, b in zip(points, bow, strict=True)]
    raise ValueError(f"no such shape: {shape}")


def _blob(rng: random.Random) -> list[tuple[float, float]]:
    """A shape without a name: smooth, or with three to ten corners."""
    if rng.random() < 0.5:
        n, waves = 48, [(k, rng.uniform(0, 0.7) / k, rng.uniform(0, 2 * math.pi)) for k in (2, 3, 4, 5)]
        radii = [
            1 + sum(size * math.cos(2 * math.pi * k * j / n + start) for k, size, start in waves) for j in range(n)
        ]
    else:
        n = rng.randint(3, 10)
        radii = [rng.uniform(0.4, 1.0) for _ in range(n)]
    scale = 1.1 / max(radii)
    turns = [2 * math.pi * j / n for j in range(n)]
    return [(scale * r * math.cos(a), scale * r * math.sin(a)) for r, a in zip(radii, turns, strict=True)]


_ARM, _LONG = 0.33, 1.0
_CROSS = [
    (-1, -1, _ARM, _LONG), (1, -1, _ARM, _LONG), (1, -1, _ARM, _ARM), (1, -1, _LONG, _ARM),
    (1, 1, _LONG, _ARM), (1, 1, _ARM, _ARM), (1, 1, _ARM, _LONG), (-1, 1, _ARM, _LONG),
    (-1, 1, _ARM, _ARM), (-1, 1, _LONG, _ARM), (-1, -1, _LONG, _ARM), (-1, -1, _ARM, _ARM),
]  # fmt: skip


def rgb(colour: str) -> tuple[int, int, int]:
    """A colour by its name, or by `#rrggbb`."""
    r, g, b = RGB[colour] if colour in RGB else bytes.fromhex(colour[1:])
    return r, g, b


def _shade(colour: str, rng: random.Random) -> tuple[int, int, int]:
    """A colour as one meets it: a little lighter or darker, a little off."""
    light = rng.uniform(0.9, 1.06)
    r, g, b = (min(255, max(0, round(c * light + rng.uniform(-8, 8)))) for c in rgb(colour))
    return r, g, b


def _background(rng: random.Random) -> Image.Image:
    """Soft paper: a pale tint that fades from one corner to the other."""
    first, second = ([rng.randint(230, 252) for _ in range(3)] for _ in range(2))
    across, down = np.meshgrid(np.linspace(0, 1, SIDE), np.linspace(0, 1, SIDE))
    fade = (across * rng.random() + down * rng.random())[..., None] / 2
    paper = np.array(first) * (1 - fade) + np.array(second) * fade
    return Image.fromarray(paper.astype(np.uint8)).resize((SIDE * FINE, SIDE * FINE), Image.Resampling.NEAREST)


def paint(things: list[Thing], rng: random.Random) -> Image.Image:
    """Draw the things on paper, with smooth edges and a little sensor noise."""
    big = _background(rng)
    pen = ImageDraw.Draw(big)
    for thing in things:
        corners = FINE * (thing.corners + np.array([thing.x, thing.y]))
        pen.polygon([(x, y) for x, y in corners.tolist()], fill=_shade(thing.colour, rng))
    small = np.asarray(big.reduce(FINE), dtype=np.int16)
    noise = np.random.default_rng(rng.getrandbits(32)).integers(-4, 5, size=small.shape, dtype=np.int16)
    return Image.fromarray((small + noise).clip(0, 255).astype(np.uint8))


# ---------------------------------------------------------------- arranging


def arrange(looks: list[tuple[str, str]], rng: random.Random, smallest: float = 11.0) -> list[Thing]:
    """Give every (shape, colour) a size and a free spot; the more there are, the smaller they get."""
    largest = {1: 30.0, 2: 24.0, 3: 20.0}.get(len(looks), 17.0)
    while True:  # a picture that got crowded is begun again
        things: list[Thing] = []
        for shape, colour in looks:
            thing = _put(shape, colour, (smallest, largest), things, rng)
            if thing is None:
                break
            things.append(thing)
        if len(things) == len(looks):
            return things


def _put(shape: str, colour: str, sizes: tuple[float, float], others: list[Thing], rng: random.Random) -> Thing | None:
    radius = rng.uniform(*sizes)
    for _ in range(40):
        edge = radius * 1.1 + 1
        x, y = rng.uniform(edge, SIDE - edge), rng.uniform(edge, SIDE - edge)
        if all(math.hypot(x - o.x, y - o.y) > (radius + o.radius) * 1.12 + 2 for o in others):
            return Thing(shape, colour, x, y, radius, rng.uniform(-0.35, 0.35))
    return None


# ---------------------------------------------------------------- the base's world


def look_picture(seed: int) -> tuple[Image.Image, list[Thing]]:
    """A picture without questions, of one to four things; half of them have no name for shape and colour."""
    rng = random.Random(f"look {seed}")
    looks = [(rng.choice(BASE_SHAPES), rng.choice(BASE_COLOURS)) for _ in range(rng.choice(COUNTS))]
    looks = [look if rng.random() < 0.5 else (f"blob {rng.getrandbits(32)}", _any_colour(rng)) for look in looks]
    things = arrange(looks, rng)
    return paint(things, rng), things


def _any_colour(rng: random.Random) -> str:
    strong = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.45, 0.95), rng.uniform(0.45, 1.0))
    return "#" + bytes(round(255 * c) for c in strong).hex()


def base_picture(seed: int) -> tuple[Image.Image, list[Turn]]:
    """A picture of one to three different things with a name, questions about it, and last its description from left to
    right."""
    rng = random.Random(f"base {seed}")
    n = rng.choice((1, 2, 2, 3))
    looks = list(zip(rng.sample(BASE_SHAPES, n), rng.sample(BASE_COLOURS, n), strict=True))
    things = arrange(looks, rng)
    turns = [_colour_or_shape(shape, colour, rng) for shape, colour in looks]
    turns += [_yes_no(looks, rng), _is_there(looks, rng), _is_at(things, rng), _say(rng)]
    rng.shuffle(turns)
    seen = ", ".join(f"{thing.colour} {thing.shape}" for thing in sorted(things, key=lambda thing: thing.x))
    return paint(things, rng), [*turns, Turn("describe", "What do you see?", seen)]


def _colour_or_shape(shape: str, colour: str, rng: random.Random) -> Turn:
    """One of the two only: the answer to one would give away the other's in the same conversation."""
    if rng.random() < 0.5:
        return Turn("colour", f"What colour is the {shape}?", colour)
    return Turn("shape", f"What shape is {colour}?", shape)


def _say(rng: random.Random) -> Turn:
    word = rng.choice(NEW_WORDS + BASE_SHAPES + BASE_COLOURS)
    return Turn("say", f"Say {word}.", word)


def _yes_no(looks: list[tuple[str, str]], rng: random.Random) -> Turn:
    shape, colour = rng.choice(looks)
    asked = colour if rng.random() < 0.5 else rng.choice(BASE_COLOURS)
    return Turn("yes or no", f"Is the {shape} {asked}?", "yes" if asked == colour else "no")


def _is_at(things: list[Thing], rng: random.Random) -> Turn:
    clear = [thing for thing in things if thing.place]
    if not clear:
        return _say(rng)
    thing, side = rng.choice(clear), rng.choice(("top", "bottom", "left", "right"))
    return Turn("yes or no", f"Is the {thing.shape} at the {side}?", "yes" if side in str(thing.place) else "no")


def _is_there(looks: list[tuple[str, str]], rng: random.Random) -> Turn:
    there = [shape for shape, _ in looks]
    asked = rng.choice(there if rng.random() < 0.5 else BASE_SHAPES)
    return Turn("yes or no", f"Is there a {asked}?", "yes" if asked in there else "no")


# ---------------------------------------------------------------- the demo's world


def demo_picture(seed: int, kind: str) -> tuple[Image.Image, list[Turn]]:
    """A picture of one to three things; the first turn is of the wanted kind, others about the same picture follow."""
    rng = random.Random(f"demo {seed}")
    while True:
        things = arrange(_looks(rng), rng, smallest=13.0)
        turns = _questions(things)
        wanted = [turn for turn in turns if turn.kind == kind]
        if wanted:
            first = rng.choice(wanted)
            rest = [turn for turn in turns if turn.kind != kind]
            rng.shuffle(rest)
            return paint(things, rng), [first, *rest]


def _looks(rng: random.Random) -> list[tuple[str, str]]:
    """Shapes and colours may come twice, and what the base knows is as frequent as what is new."""
    shapes, colours = ((BASE_SHAPES, NEW_SHAPES), (BASE_COLOURS, NEW_COLOURS))
    return [(rng.choice(rng.choice(shapes)), rng.choice(rng.choice(colours))) for _ in range(rng.choice(DEMO_COUNTS))]


def _questions(things: list[Thing]) -> list[Turn]:
    """Every question that has one answer and that the base was never taught to answer."""
    shapes = [t.shape for t in things]
    turns = []
    for thing in things:
        known = thing.shape in BASE_SHAPES and shapes.count(thing.shape) == 1
        if known and thing.colour in NEW_COLOURS:
            turns.append(Turn("colour", f"What colour is the {thing.shape}?", thing.colour))
    turns.append(Turn("count", "How many shapes are there?", str(len(things))))
    return turns


# ---------------------------------------------------------------- the demo's files

HELD_OUT_SEED = 50_000_000  # far from every training seed: a held-out picture is never drawn for training
TURNS = 3  # questions about one training picture, one conversation


def write_demo(folder: Path, n_train: int, n_held_out: int, seed: int = 0) -> Path:
    """Draw the demo's pictures and records into `folder`; returns the registry, what `--dataset_config_path` takes."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    _write_set(folder, "train", seed * n_train, n_train, TURNS)
    _write_set(folder, "held_out", HELD_OUT_SEED, n_held_out, 1)
    sets = {
        "shapes": {"json_path": "train.jsonl", "image_root": "pictures", "split": "train"},
        "held_out": {"json_path": "held_out.jsonl", "image_root": "pictures", "split": "eval"},
    }
    registry = folder / "dataset_config.json"
    registry.write_text(json.dumps({"datasets": sets}, indent=2) + "\n")
    return registry


def _write_set(folder: Path, name: str, first_seed: int, n: int, turns: int) -> None:
    """Every kind of question comes equally often as the first of a conversation."""
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for k in range(n):
            picture, asked = demo_picture(first_seed + k, KINDS[k % len(KINDS)])
            image = f"{name}-{k:05}.jpg"
            picture.save(folder / "pictures" / image, quality=95, subsampling=0)
            file.write(json.dumps(_record(f"{name}-{k:05}", image, asked[:turns])) + "\n")


def _record(name: str, image: str, turns: list[Turn]) -> dict[str, object]:
    """OpenAI's message blocks, one of the formats that vlft reads."""
    messages: list[dict[str, object]] = []
    for k, turn in enumerate(turns):
        content: list[dict[str, str]] = [{"type": "text", "text": turn.question}]
        if k == 0:
            content.insert(0, {"type": "image", "image": image})
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.answer}]
    return {"id": name, "kind": turns[0].kind, "messages": messages}
