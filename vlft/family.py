"""What differs between the supported model families, as one table. No torch here: start-up and `--help` read it.

To support another family, add a row to `FAMILIES`, a tiny model of it to `vlft/testing/tiny.py`, and the equality tests
(`tests/models/test_forward.py`) run for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlft.errors import ModelError

Part = Literal["llm", "vit", "projector", "head"]
PARTS: tuple[Part, ...] = ("llm", "vit", "projector", "head")


@dataclass(frozen=True)
class Parts:
    """Real module paths inside the Hugging Face model (not substrings: a bare `gate_proj` also hits a ViT)."""

    vit: str
    """Module path of the vision tower; the projector lives inside it."""
    projector: tuple[str, ...]
    """Module paths of the mergers that map vision features to the LLM's width."""
    llm: str
    """Module path of the language model without its head."""
    layers: str
    """Module path of the decoder layers, first to last."""
    embed: str
    """Module path of the token embeddings."""
    norm: str
    """Module path of the final norm."""
    head: str
    """Module path of the output head."""

    def part_of(self, name: str, *, tied_head: bool = False) -> Part:
        """The part that a parameter or module called `name` belongs to.

        Names of wrapped models (`base_model.model.` of PEFT, `model.` of vlft's own wrapper) are understood.

        Args:
            name: qualified parameter or module name.
            tied_head: the head shares its weight with the embeddings, so it counts as "llm".
        Raises:
            ModelError: the name lies in none of the parts.
        """
        for part, paths in (
            ("projector", self.projector),
            ("vit", (self.vit,)),
            ("llm", (self.llm,)),
            ("head", (self.head,)),
        ):
            for path in paths:
                if f".{path}." in f".{name}.":
                    return "llm" if part == "head" and tied_head else part  # type: ignore[return-value]
        raise ModelError(f"'{name}' lies in none of the model's parts {self}.")


@dataclass(frozen=True)
class Family:
    model_type: str
    """`model_type` of the checkpoint's config.json."""
    title: str
    parts: Parts
    box_convention: Literal["relative1000", "resized_pixels"]
    """What a coordinate means to this family: thousandths of the picture, or pixels of the RESIZED picture."""
    box_template: str
    """How one box is written in a conversation; fields x1, y1, x2, y2."""
    ref_template: str
    """How a referred object is written; field ref."""
    markers: tuple[str, ...]
    """Special tokens that structure a conversation: inside a record's own text they forge turns or pictures."""
    image_token: str = "<|image_pad|>"
    window_pixels: int = 0
    """Side of the windows of the vision tower's attention where config.json names none; 0: it has no windows."""
    learnt_positions: int = 0
    """Positions that the vision tower has learnt where config.json does not say how many; 0: none."""


_QWEN_MARKERS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def _qwen_parts(*more_projectors: str) -> Parts:
    return Parts(
        vit="model.visual",
        projector=("model.visual.merger", *more_projectors),
        llm="model.language_model",
        layers="model.language_model.layers",
        embed="model.language_model.embed_tokens",
        norm="model.language_model.norm",
        head="lm_head",
    )


_MARKED_BOX = "<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
_MARKED_REF = "<|object_ref_start|>{ref}<|object_ref_end|>"

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("qwen2_vl", "Qwen2-VL", _qwen_parts(), "relative1000", _MARKED_BOX, _MARKED_REF, _QWEN_MARKERS),
        Family(
            "qwen2_5_vl",
            "Qwen2.5-VL",
            _qwen_parts(),
            "resized_pixels",
            "[{x1}, {y1}, {x2}, {y2}]",
            "{ref}",
            _QWEN_MARKERS,
            window_pixels=112,
        ),
        Family(
            "qwen3_vl",
            "Qwen3-VL",
            _qwen_parts("model.visual.deepstack_merger_list"),
            "relative1000",
            "[{x1}, {y1}, {x2}, {y2}]",
            "{ref}",
            _QWEN_MARKERS,
            learnt_positions=2304,
        ),
    )
}


def family_of(model_type: str, where: str = "the checkpoint") -> Family:
    """The family of a checkpoint.

    Raises:
        ModelError: the type is not supported; the message lists those that are.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    known = ", ".join(f"{f.model_type} ({f.title})" for f in FAMILIES.values())
    raise ModelError(f"{where} is of type '{model_type}', which vlft does not support; supported: {known}.")
