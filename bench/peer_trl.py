"""One row of the peer: TRL's SFTTrainer (Liger, gradient checkpointing, FlashAttention-2) on the same data.

bench/train.py starts it; alone: `PYTHONPATH=bench/shim python bench/peer_trl.py --size 3B --strategy full`. The
strategies are vlft's words for what trains.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import workload
from measure import MODES, Recorder

RANK = 64


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="3B")
    parser.add_argument("--strategy", choices=MODES, default="full")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of weights; fp32: under autocast")
    parser.add_argument("--data", choices=("documents", "short"), default="documents")
    parser.add_argument("--records", type=int, default=256)
    parser.add_argument("--bs", type=int, default=4)
    parser.add_argument("--ga", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--attn", default="flash_attention_2")
    parser.add_argument("--liger", type=int, default=1)
    parser.add_argument("--gc", type=int, default=1, help="gradient checkpointing")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--root", type=Path, default=workload.default_root())
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--line", type=Path, help="file for the JSON line, beside stdout")
    return parser.parse_args(argv)


def records(a: argparse.Namespace) -> Any:
    """The rows of the set as TRL's prompt and completion; pictures are decoded from their files when they are used."""
    from datasets import Dataset, Image, Sequence

    folder = {"documents": workload.documents, "short": workload.short}[a.data](a.root, a.records).parent
    rows = []
    for line in (folder / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        question, answer = record["messages"]
        asked = {"role": "user", "content": question["content"].replace("<image>", "")}
        images = [str(folder / path) for path in record["images"]]
        rows.append({"images": images, "prompt": [asked], "completion": [answer]})
    return Dataset.from_list(rows).cast_column("images", Sequence(Image()))


def load(a: argparse.Namespace, folder: Path) -> tuple[Any, Any]:
    """The model and what PEFT is to do to it."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    dtype = torch.bfloat16 if a.dtype == "bf16" else torch.float32
    how: dict[str, Any] = {"dtype": dtype, "attn_implementation": a.attn}
    how["device_map"] = {"": 0 if a.device == "cuda" else "cpu"}
    if a.strategy == "qlora":
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["model.visual", "visual", "lm_head"],
        )  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(folder, **how)
    if a.strategy == "full":
        return model, None
    target = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    whole = ["visual"] if a.strategy == "lora_llm_full_vit" else None
    adapters = LoraConfig(
        r=RANK, lora_alpha=16, lora_dropout=0.05, task_type="CAUSAL_LM", target_modules=target, modules_to_save=whole
    )
    return model, adapters


def configure(a: argparse.Namespace, steps: int) -> Any:
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(a.root / "trl-out"), per_device_train_batch_size=a.bs, gradient_accumulation_steps=a.ga,
        max_steps=steps, bf16=a.device == "cuda", use_cpu=a.device == "cpu", logging_steps=1, save_strategy="no",
        report_to=[], gradient_checkpointing=bool(a.gc), gradient_checkpointing_kwargs={"use_reentrant": False},
        use_liger_kernel=bool(a.liger), dataloader_num_workers=a.workers, max_length=None, learning_rate=1e-5,
        optim="adamw_torch_fused", completion_only_loss=True,
    )  # fmt: skip


def measured_trainer(recorder: Recorder) -> type:
    """SFTTrainer that tells the recorder of its steps."""
    from trl import SFTTrainer

    class Trainer(SFTTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            recorder.begin()
            learnt = (inputs["labels"] != -100).sum()
            recorder.work_on_device(inputs["attention_mask"].sum(1), inputs["image_grid_thw"], learnt)
            return super().training_step(model, inputs, *rest, **more)

    return Trainer


def listener(recorder: Recorder) -> Any:
    from transformers import TrainerCallback

    class Listener(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any = None, optimizer: Any = None, **__: Any) -> None:
            recorder.dtypes(model, optimizer)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            recorder.end()

    return Listener()


class Plain:
    """A model for `vlft.models.flops`, without what PEFT keeps beside a tower in `modules_to_save`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def named_parameters(self, **how: Any) -> Any:
        for name, p in self.model.named_parameters(**how):
            if ".original_module." not in name:
                yield name.replace(".modules_to_save.default", ""), p


def main() -> None:
    a = options()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vlft.family import FAMILIES
    from vlft.models.flops import describe

    folder = a.root / f"model-{a.size}"
    recorder = Recorder(a.steps, a.warm, device=a.device, profile=a.profile)
    model, adapters = load(a, folder)
    trainer = measured_trainer(recorder)(
        model=model, args=configure(a, recorder.total), train_dataset=records(a), peft_config=adapters,
        processing_class=workload.processor(folder), callbacks=[listener(recorder)],
    )  # fmt: skip
    trainer.train()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    config = trained.config
    counts = describe(Plain(trained), FAMILIES[config.model_type].parts, config)
    line = recorder.line(config, counts, MODES[a.strategy], 0 if adapters is None else RANK)
    line |= {"batch": [a.bs, a.ga], "gradient_checkpointing": bool(a.gc), "liger": bool(a.liger), "attention": a.attn}
    print(json.dumps(line), flush=True)
    if a.line:
        a.line.write_text(json.dumps(line))


if __name__ == "__main__":
    main()
