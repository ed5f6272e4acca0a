"""Tiny random checkpoints of every family, with a small Qwen-like tokenizer: what tests train. Nothing is downloaded.

`make_checkpoint` writes a folder laid out as a real Qwen-VL checkpoint is (config, weights, tokenizer, chat template,
preprocessor and video preprocessor), so that the code under test loads it as it would load the real one.
"""

from __future__ import annotations

import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
# How Qwen's tokenizers split text: digits one by one, newlines glued to what precedes them.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = (
    "the a of to and in is on with for chart table what colour shape where how many red green blue left right above "
    "below between picture describe read word number circle square triangle user assistant system helpful You are"
).split()
_TURN = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' and DEFAULT_SYSTEM %}"
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


def chat_template(family: str) -> str:
    """Qwen2 and 2.5 add a default system turn, Qwen3 does not."""
    return _TURN.replace("DEFAULT_SYSTEM", "false" if family == "qwen3_vl" else "true")


@lru_cache(maxsize=1)
def _tokenizer_json() -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    corpus = [" ".join(rng.choices(WORDS, k=40)) + "\n\n" for _ in range(300)]
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator(corpus, trainer)
    return tok.to_str()


def make_tokenizer(family: str = "qwen2_5_vl") -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tok = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:],
    )
    tok.chat_template = chat_template(family)
    return tok


def make_config(family: str, tok: Any, *, tie: bool = False, layers: int = 3) -> Any:
    import transformers as t

    ids = {s: tok.convert_tokens_to_ids(s) for s in SPECIAL}
    text: dict[str, Any] = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=4096, tie_word_embeddings=tie,
        bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
    )  # fmt: skip
    top: dict[str, Any] = dict(
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tie,
    )  # fmt: skip
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    if family == "qwen2_vl":
        vision = dict[str, Any](depth=3, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=2, patch_size=14)
        return t.Qwen2VLConfig(text_config=dict(**text, rope_parameters=rope), vision_config=vision, **top)
    if family == "qwen2_5_vl":
        vision = dict[str, Any](
            depth=3, hidden_size=32, intermediate_size=52, num_heads=2, out_hidden_size=64, patch_size=14,
            window_size=56, fullatt_block_indexes=[1],
        )  # fmt: skip
        return t.Qwen2_5_VLConfig(text_config=dict(**text, rope_parameters=rope), vision_config=vision, **top)
    vision = dict[str, Any](
        depth=3, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, patch_size=16,
        num_position_embeddings=16, deepstack_visual_indexes=[0, 1],
    )  # fmt: skip
    text = {k: v for k, v in text.items() if k != "bos_token_id"}
    rope["mrope_interleaved"] = True
    return t.Qwen3VLConfig(text_config=dict(**text, head_dim=16, rope_parameters=rope), vision_config=vision, **top)


def make_checkpoint(
    family: str, path: Path, *, dtype: str = "float32", tie: bool = False, seed: int = 0, layers: int = 3
) -> Path:
    """Write a tiny random checkpoint of `family` to `path` and return it."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tok = make_tokenizer(family)
    config = make_config(family, tok, tie=tie, layers=layers)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Larger than the usual init, so that a wrong mask or position changes the loss visibly; biases not zero.
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.05)
            else:
                p.copy_(torch.randn_like(p) * (0.3 if "embed" in name else 1.0) / p[0].numel() ** 0.5)
    model.tie_weights()
    model.to(getattr(torch, dtype)).save_pretrained(path)
    tok.save_pretrained(path)
    patch = config.vision_config.patch_size
    mean_std = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if family == "qwen3_vl" else {}
    size = {"shortest_edge": 4 * (2 * patch) ** 2, "longest_edge": 12845056}
    processor = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, temporal_patch_size=2, size=size, **mean_std)
    processor.save_pretrained(path)
    written = json.loads((path / "preprocessor_config.json").read_text())
    written |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    (path / "preprocessor_config.json").write_text(json.dumps(written, indent=2))
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": patch, "merge_size": 2}
    (path / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2))
    return path
