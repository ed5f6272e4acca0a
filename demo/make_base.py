"""Makes `demo/base`, the tiny vision-language model that the demo fine-tunes: `python -m demo.make_base`.

Everything is built from nothing and from fixed seeds: pictures are drawn (`demo/draw.py`), a small Qwen-like tokenizer
is learnt from the questions, a Qwen2.5-VL of 1.6 million parameters is trained on one thread (`demo/teach.py`), and the
folder is laid out as a real Qwen2.5-VL checkpoint is. Ends with the exact match on pictures that it has not seen.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo import draw
from demo.ask import Asked, exact_match
from demo.teach import MERGE, PATCH, learn_to_look, learn_to_talk

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
# How Qwen's tokenizers split text: digits one by one, newlines glued to what precedes them.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What Qwen2.5-VL's own template does with text and pictures.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


# ---------------------------------------------------------------- what it is made of


def make_tokenizer() -> Any:
    """A byte-level BPE that knows each word of the drawn world as one token, in all the ways that it is written."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pieces = [
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=768, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(_corpus(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=SPECIAL[1:]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _corpus() -> list[str]:
    """Each word often enough, with and without the space before it."""
    words = [*draw.SHAPES, *draw.BASE_COLOURS, *draw.NEW_WORDS, "yes", "no", "top", "bottom", "left", "right"]
    asked = ["What colour is the", "What shape is", "Is there a", "Where is the", "How many shapes are there?", "Say"]
    asked += ["What do you see? red,", "Is at the"]
    roles = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    return [*words, *(f"{ask} {word}?" for ask in asked for word in words), *roles] * 4


def make_config(tokenizer: Any) -> Any:
    """Qwen2.5-VL, small. Inputs of the language model's linears are multiples of 64, the block of NF4."""
    from transformers import Qwen2_5_VLConfig

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    text = {
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64 * math.ceil(len(tokenizer) / 64), "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "depth": 4, "hidden_size": 96, "intermediate_size": 192, "num_heads": 3, "out_hidden_size": 128,
        "patch_size": PATCH, "spatial_merge_size": MERGE, "window_size": 56, "fullatt_block_indexes": [1, 3],
    }  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip


def initialise(model: nn.Module) -> None:
    """Every product keeps the scale of what goes into it: the library's 0.02 is meant for far wider models."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                scale = 0.5 if "embed_tokens" in name else 0.7 / weight[0].numel() ** 0.5
                weight.copy_(torch.randn_like(weight) * scale)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Lay the folder out as a Qwen2.5-VL checkpoint is: what loads the real one loads this one."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 4 * (PATCH * MERGE) ** 2, "longest_edge": 12845056}
    processor = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2, size=size)
    processor.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    named = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    path.write_text(json.dumps(json.loads(path.read_text()) | named, indent=2) + "\n")
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": PATCH, "merge_size": MERGE}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n")


# ---------------------------------------------------------------- the whole


def held_out(n: int) -> list[Asked]:
    """Base pictures from seeds that training never draws, one question each (no 'Say ...': that needs no eyes)."""
    asked = []
    for seed in range(10_000_000, 10_000_000 + n):
        picture, turns = draw.base_picture(seed)
        turn = next(turn for turn in turns if turn.kind != "say")
        asked.append(Asked(picture, turn.kind, turn.question, turn.answer))
    return asked


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "base")
    options.add_argument("--pictures", type=int, default=12_000)
    options.add_argument("--looks", type=int, default=1500, help="steps of the vision tower alone")
    options.add_argument("--talks", type=int, default=2500, help="steps of the language model over it")
    chosen = options.parse_args()
    from transformers import AutoModelForImageTextToText

    torch.set_num_threads(1)  # sums in one order, so the same machine makes the same model
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = AutoModelForImageTextToText.from_config(make_config(tokenizer)).train()
    initialise(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    learn_to_look(model.model.visual, chosen.pictures, chosen.looks, 32, 2e-3)
    learn_to_talk(model, tokenizer, chosen.pictures, chosen.talks, 16, 1.5e-3)
    save(model, tokenizer, chosen.output_dir)
    right, answers = exact_match(chosen.output_dir, held_out(300))
    print(f"exact match on {len(answers)} held-out pictures of the base's world: {right:.1%}")


if __name__ == "__main__":
    main()
