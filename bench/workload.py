"""What every bench trains: random weights of a real size, document-like pictures, conversations. Nothing is downloaded.

    python bench/workload.py 3B 7B        # model folders and data sets, made once, below --root

Speed and memory do not depend on the weights' values. Weights are drawn on the GPU where there is one: seconds, where
a CPU takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for _place in (ROOT / "plugins", ROOT):  # this checkout, whatever else is installed
    if str(_place) not in sys.path:
        sys.path.insert(0, str(_place))

MAX_PIXELS = 1003520
"""Largest picture, as vlft's own default; the peers read it from the folder's processor."""
WORDS = (
    "the a of to and in is on with for chart table invoice total amount date north south value report figure line bar "
    "red green blue left right above below between sensor reading month year average maximum minimum step label axis "
    "customer order number price tax item quantity description shipping address account balance statement read this "
    "document describe it user assistant system you are helpful"
).split()
SHAPES = ((640, 480), (1024, 768), (1280, 960), (800, 1100), (448, 448), (1600, 900))

# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def _text(width: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, int]:
    return dict(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=kv_heads, vocab_size=vocabulary)  # fmt: skip


def _vision2(width: int) -> dict[str, Any]:
    return dict(depth=32, embed_dim=1280, num_heads=16, mlp_ratio=4, hidden_size=width, patch_size=14)


def _vision25(width: int) -> dict[str, Any]:
    return dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=width, patch_size=14,
                window_size=112, fullatt_block_indexes=[7, 15, 23, 31])  # fmt: skip


def _vision3(depth: int, width: int, inner: int, levels: list[int], out: int) -> dict[str, Any]:
    return dict(depth=depth, hidden_size=width, intermediate_size=inner, num_heads=16, out_hidden_size=out,
                patch_size=16, num_position_embeddings=2304, deepstack_visual_indexes=levels)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """A model's sizes, from the config.json of the published checkpoint."""

    family: str
    text: dict[str, int]
    vision: dict[str, Any]
    tied: bool
    """The head is the embedding."""


SIZES = {
    "3B": Size("qwen2_5_vl", _text(2048, 11008, 36, 16, 2, 151936), _vision25(2048), True),
    "7B": Size("qwen2_5_vl", _text(3584, 18944, 28, 28, 4, 152064), _vision25(3584), False),
    "qwen2-2B": Size("qwen2_vl", _text(1536, 8960, 28, 12, 2, 151936), _vision2(1536), True),
    "qwen2-7B": Size("qwen2_vl", _text(3584, 18944, 28, 28, 4, 152064), _vision2(3584), False),
    "qwen3-2B": Size(
        "qwen3_vl", _text(2048, 6144, 28, 16, 8, 151936), _vision3(24, 1024, 4096, [5, 11, 17], 2048), True
    ),
    "qwen3-4B": Size(
        "qwen3_vl", _text(2560, 9728, 36, 32, 8, 151936), _vision3(24, 1024, 4096, [5, 11, 17], 2560), True
    ),
    "qwen3-8B": Size(
        "qwen3_vl", _text(4096, 12288, 36, 32, 8, 151936), _vision3(27, 1152, 4304, [8, 16, 24], 4096), False
    ),
    "tiny": Size(
        "qwen2_5_vl", _text(128, 256, 2, 4, 2, 4096),
        _vision25(128) | dict(depth=2, hidden_size=64, intermediate_size=100, num_heads=2, fullatt_block_indexes=[1]),
        False,
    ),
}  # fmt: skip


def make_tokenizer(family: str) -> Any:
    """A byte-level BPE that knows each word of WORDS, with the family's special tokens and chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from vlft.testing.tiny import QWEN_SPLIT, SPECIAL, chat_template

    inner = Tokenizer(models.BPE())
    cut = [pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    inner.pre_tokenizer = pre_tokenizers.Sequence(cut)
    inner.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    corpus = [" ".join(rng.choices(WORDS, k=40)) + "\nYou Read 0123456789." for _ in range(2000)]
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=SPECIAL, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=SPECIAL[1:]
    )
    tokenizer.chat_template = chat_template(family)
    return tokenizer


def make_config(size: str, tokenizer: Any) -> Any:
    import transformers

    from vlft.testing.tiny import SPECIAL

    s = SIZES[size]
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    head = 128 if s.family == "qwen3_vl" else s.text["hidden_size"] // s.text["num_attention_heads"]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
    rope["mrope_section"] = [head // 8, head * 3 // 16, head * 3 // 16]
    text: dict[str, Any] = s.text | dict(
        max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=s.tied, rope_parameters=rope,
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
    )  # fmt: skip
    if s.family == "qwen3_vl":
        rope |= {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_theta": 5e6}
        text["head_dim"] = head
    else:
        text["bos_token_id"] = ids["<|endoftext|>"]
    kind = {"qwen2_vl": "Qwen2VLConfig", "qwen2_5_vl": "Qwen2_5_VLConfig", "qwen3_vl": "Qwen3VLConfig"}[s.family]
    return getattr(transformers, kind)(
        text_config=text, vision_config=dict(s.vision), tie_word_embeddings=s.tied,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip


def save_processors(folder: Path, family: str, patch: int, max_pixels: int) -> None:
    """The processors' files as a published checkpoint has them, with this limit of a picture."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    mean_std = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if family == "qwen3_vl" else {}
    limits = {"shortest_edge": 4 * (2 * patch) ** 2, "longest_edge": max_pixels}
    sizes = dict(patch_size=patch, merge_size=2, temporal_patch_size=2)
    Qwen2VLImageProcessorPil(**sizes, size=limits, **mean_std).save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    named = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    path.write_text(json.dumps(json.loads(path.read_text()) | named, indent=2))
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": patch, "merge_size": 2}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2))


def make_model(size: str, folder: Path, max_pixels: int = MAX_PIXELS) -> Path:
    """A folder that `from_pretrained` and AutoProcessor read: bf16 weights of that size. Made once."""
    if (folder / "made").exists():
        return folder
    import torch
    from transformers import AutoModelForImageTextToText

    shutil.rmtree(folder, ignore_errors=True)
    family = SIZES[size].family
    tokenizer = make_tokenizer(family)
    config = make_config(size, tokenizer)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="4GB")
    tokenizer.save_pretrained(folder)
    save_processors(folder, family, config.vision_config.patch_size, max_pixels)
    (folder / "made").touch()
    return folder


def processor(folder: Path) -> Any:
    """What AutoProcessor makes; without torchvision the same over Pillow's image processor, for pictures alone."""
    from transformers import AutoProcessor, AutoTokenizer, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return AutoProcessor.from_pretrained(folder)

    class Composed(Qwen2_5_VLProcessor):  # type: ignore[misc]
        def check_argument_for_proper_class(self, *_: Any) -> None:
            """The video processor is None."""

    tokenizer = AutoTokenizer.from_pretrained(folder)
    pictures = Qwen2VLImageProcessorPil.from_pretrained(folder)
    return Composed(pictures, tokenizer, None, chat_template=tokenizer.chat_template)


# ---------------------------------------------------------------------------------------------------------------------
# Data: JSONL of messages with <image>, which vlft's registry and the peers' scripts both read
# ---------------------------------------------------------------------------------------------------------------------


def document(path: Path, wh: tuple[int, int], seed: int) -> None:
    """A page of words on paper with grain, as a scan has it."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFilter

    rng, grain = random.Random(seed), np.random.default_rng(seed)
    w, h = wh
    noise = np.clip(grain.standard_normal((h, w), np.float32) * 40 + 128, 0, 255).astype(np.uint8)
    page = Image.fromarray(noise).convert("RGB").filter(ImageFilter.GaussianBlur(1))
    pen = ImageDraw.Draw(page)
    for y in range(10, h - 20, 24):
        colour = (rng.randrange(120), rng.randrange(120), rng.randrange(120))
        pen.text((10, y), " ".join(rng.choices(WORDS, k=w // 60)), fill=colour)
    page.save(path, quality=90)


def write_set(
    folder: Path, count: int, shapes: Sequence[tuple[int, int]], words: tuple[int, int], question: str
) -> Path:
    """`count` pictures of these sizes, in random order, each with one answer of so many words; returns the registry."""
    registry = folder / "registry.json"
    if registry.exists():
        return registry
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    sizes = [rng.choice(shapes) for _ in range(count)]
    paths = [folder / "images" / f"{i:05}.jpg" for i in range(count)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        list(pool.map(document, paths, sizes, range(count), chunksize=8))
    with (folder / "records.jsonl").open("w") as out:
        for i in range(count):
            answer = " ".join(rng.choices(WORDS, k=rng.randint(*words)))
            turns = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"id": f"{i:05}", "images": [f"images/{i:05}.jpg"], "messages": turns}) + "\n")
    sets = {"bench": {"json_path": "records.jsonl", "image_root": "."}}
    registry.write_text(json.dumps({"datasets": sets}, indent=2))
    return registry


def documents(root: Path, count: int = 256) -> Path:
    """Six real sizes, about a thousand tokens a sample, one in ten of them learnt."""
    return write_set(root / f"documents-{count}", count, SHAPES, (30, 150), "Read this document and describe it.")


def short(root: Path, count: int = 512) -> Path:
    """256 image tokens and about 30 of text."""
    return write_set(root / f"short-{count}", count, ((448, 448),), (2, 6), "Read it.")


def default_root() -> Path:
    """Memory rather than disk where it has room for the models."""
    shm = Path("/dev/shm")
    roomy = shm.is_dir() and os.access(shm, os.W_OK) and shutil.disk_usage(shm).free > 40e9
    return (shm if roomy else Path("/tmp")) / "vlft_bench"


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs by formula: a second count beside vlft.models.flops, from sums instead of a walk through the modules
# ---------------------------------------------------------------------------------------------------------------------


def formula_flops(
    config: Any, lengths: Sequence[int], grids: Sequence[Sequence[int]], supervised: int, mode: str, rank: int = 0
) -> float | None:
    """Model FLOPs of forward and backward of a Qwen2.5-VL; None for another family.

    Args:
        lengths: tokens of each sample; grids: (t, h, w) patches of each picture; supervised: learnt tokens.
        mode: "full", "lora_vit" (adapters in the LLM, ViT and projector trained), "lora" (frozen ViT).
        rank: of the adapters.
    """
    if config.model_type != "qwen2_5_vl":
        return None
    t, v = config.text_config, config.vision_config
    D, inner, L, H, K = (
        t.hidden_size, t.intermediate_size, t.num_hidden_layers, t.num_attention_heads, t.num_key_value_heads
    )  # fmt: skip
    d, Dv, m = D // H, v.hidden_size, v.spatial_merge_size
    n, T = sum(a * b * c for a, b, c in grids), sum(lengths)
    side = v.window_size // v.patch_size

    def squares(x: int) -> int:
        return x // side * side**2 + (x % side) ** 2

    embed = 2 * n * 3 * v.temporal_patch_size * v.patch_size**2 * Dv
    blocks = 2 * n * v.depth * (4 * Dv**2 + 3 * Dv * v.intermediate_size)
    whole, full = sum(a * (b * c) ** 2 for a, b, c in grids), len(v.fullatt_block_indexes)
    windows = sum(a * squares(b) * squares(c) for a, b, c in grids)
    seeing = 4 * Dv * (full * whole + (v.depth - full) * windows)
    merger = 2 * (n // m**2) * ((m * m * Dv) ** 2 + m * m * Dv * D)
    layers = 2 * T * L * (2 * D * H * d + 2 * D * K * d + 3 * D * inner)
    attention = 4 * H * d * L * sum(s * (s + 1) / 2 for s in lengths)
    head = 2 * supervised * D * t.vocab_size
    adapters = 2 * T * L * rank * (2 * (D + H * d) + 2 * (D + K * d) + 3 * (D + inner))
    vision = 2 * embed + 3 * (blocks + seeing + merger)
    if mode == "full":
        return vision + 3 * (layers + attention + head)
    tuned = 2 * layers + 3 * attention + 2 * head + 3 * adapters
    if mode == "lora_vit":
        return vision + tuned
    first = 2 * T * (D * H * d + 2 * D * K * d)  # nothing before layer 0 needs a gradient
    return embed + blocks + seeing + merger + tuned - first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", help="model folders to make: " + ", ".join(SIZES))
    parser.add_argument("--root", type=Path, default=default_root())
    parser.add_argument("--max_pixels", type=int, default=MAX_PIXELS)
    parser.add_argument("--documents", type=int, default=0, help="records of the document set to write")
    parser.add_argument("--short", type=int, default=0, help="records of the set of short samples to write")
    given = parser.parse_args()
    for write, count in ((documents, given.documents), (short, given.short)):
        if count:
            print(write(given.root, count), flush=True)
    for size in given.sizes:
        began = time.monotonic()
        folder = make_model(size, given.root / f"model-{size}", given.max_pixels)
        print(f"{folder}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
