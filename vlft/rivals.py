"""What other projects call vlft's options, so that someone who comes from one is told the name here.

From LLaMA-Factory, ms-swift, Qwen-VL-Series-Finetune, the official qwen-vl-finetune, Axolotl, NeMo AutoModel, TRL,
Unsloth and transformers' Trainer. Names are spelt with underscores and in lower case.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_SAME: dict[str, str] = {
    "model_name_or_path": "model model_id model_id_or_path model_name model_path base_model "
    "pretrained_model_name_or_path",
    "output_dir": "out_dir output save_dir output_path",
    "resume_from_checkpoint": "resume resume_from resume_from_ckpt",
    "dataset_config_path": "custom_dataset_info dataset_info data_path data_config dataset_config image_folder "
    "media_dir image_root data_dict dataset._target_",
    "dataset_names": "dataset datasets dataset_name dataset_use dataset_name_or_path",
    "use_data_augmentation": "augment data_augmentation use_augmentation",
    "epochs": "num_train_epochs num_epochs train_epochs epoch",
    "max_steps": "max_train_steps total_steps num_steps",
    "per_device_train_batch_size": "batch_size micro_batch_size train_batch_size local_batch_size "
    "train_micro_batch_size_per_gpu per_gpu_train_batch_size",
    "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
    "gradient_accumulation_steps": "grad_accum gradient_accumulation accumulation_steps grad_accumulation_steps",
    "optim": "optimizer",
    "learning_rate_llm": "learning_rate lr llm_lr language_lr learning_rate_language optimizer.lr",
    "learning_rate_vit": "vit_lr vision_lr vision_tower_lr learning_rate_vision visual_lr",
    "learning_rate_projector": "aligner_lr merger_lr mm_projector_lr projector_lr learning_rate_merger connector_lr",
    "weight_decay": "wd",
    "warmup_steps": "num_warmup_steps lr_warmup_steps",
    "lr_scheduler_type": "lr_scheduler scheduler lr_decay_style",
    "max_grad_norm": "gradient_clipping grad_clip clip_grad_norm clip_grad max_norm",
    "max_seq_length": "cutoff_len max_length model_max_length sequence_len seq_len seq_length max_seq_len",
    "on_too_long": "truncation_strategy",
    "min_pixels": "image_min_pixels processor.min_pixels",
    "max_pixels": "image_max_pixels processor.max_pixels image_size image_resolution resize",
    "tuning_strategy": "finetuning_type tuner_type train_type adapter use_peft peft strategy sft_type",
    "save_steps": "save_interval save_every checkpoint_every checkpointing_steps",
    "save_total_limit": "max_checkpoints keep_last checkpoints_total_limit",
    "eval_steps": "eval_interval eval_every",
    "eval_dataset_scripts": "compute_metrics eval_metric metric",
    "report_to": "tracker log_with",
    "metric_for_best": "metric_for_best_model",
    "wandb_project": "project project_name",
    "wandb_run_name": "run_name experiment_name wandb_name",
    "deepspeed": "deepspeed_config ds_config deepspeed_config_file",
    "gradient_checkpointing": "use_gradient_checkpointing activation_checkpointing vit_gradient_checkpointing",
    "seed": "data_seed random_seed",
    "num_workers": "dataloader_num_workers preprocessing_num_workers num_proc dataset_num_proc",
    "cache_dir": "cache_path",
    "lora_rank": "lora_r rank peft.dim",
    "lora_alpha": "lora_a peft.alpha",
    "lora_dropout": "lora_p peft.dropout",
    "lora_target_modules": "lora_target target_modules lora_modules lora_target_linear",
    "llm_frozen_layers": "freeze_layers freeze_trainable_layers num_frozen_layers freeze_llm_layers",
}
"""Option of vlft -> names of the same thing elsewhere."""

_TOLD: dict[str, str] = {
    "choose the parts with --train_vit or --no-train_vit": (
        "freeze_vit freeze_vision_tower freeze_vision tune_mm_vision finetune_vision_layers freeze_mm_modules "
        "freeze_config.freeze_vision_tower unfreeze_vision train_vision"
    ),
    "choose the parts with --train_projector or --no-train_projector": (
        "freeze_aligner freeze_merger freeze_multi_modal_projector tune_mm_mlp freeze_projector tune_merger"
    ),
    "choose the parts with --train_llm or --no-train_llm": (
        "freeze_llm freeze_language_model tune_mm_llm finetune_language_layers freeze_config.freeze_language_model"
    ),
    "choose the parts with --train_vit, --train_projector and --train_llm, or another --tuning_strategy": (
        "freeze_config unfrozen_parameters trainable_parameters"
    ),
    "give --learning_rate_llm, --learning_rate_vit and --learning_rate_projector": "lr_groups param_group_overrides",
    "give --tuning_strategy qlora": (
        "quantization_bit quant_bits bits load_in_4bit load_in_8bit quantization quant_method use_qlora"
    ),
    "give --tuning_strategy lora, or lora_llm_full_vit to train the ViT's weights beside it": (
        "lora_enable use_lora lora"
    ),
    "give --mixed_precision bf16": "bf16",
    "give --mixed_precision fp16": "fp16",
    "give --mixed_precision no for full precision": "fp32 tf32 no_cuda",
    "give --mixed_precision bf16, fp16 or no": "torch_dtype dtype precision compute_dtype pure_bf16",
    "give --warmup_steps; without it 3% of the steps are warmup": "warmup_ratio warmup_fraction",
    "give --use_wandb": "wandb",
    "give --report_to tensorboard": "tensorboard",
    "give --report_to trackio": "trackio",
    "leave it out: every step is logged": "logging_steps log_interval logging_strategy logging_first_step log_every",
    "leave it out: metrics.jsonl is written to --output_dir": "logging_dir log_dir",
    "give --save_steps": "save_strategy",
    "leave it out: checkpoints hold all that a resume needs, the model alone is in output_dir/model": (
        "save_only_model"
    ),
    "give --eval_steps": "eval_strategy evaluation_strategy do_eval",
    "leave it out: vlft trains, and reads the rest from the checkpoint": (
        "do_train stage template model_type template_type version"
    ),
    'mark a dataset of the registry with "split": "eval"': (
        "eval_path eval_dataset val_dataset validation_dataset test_file validation_file"
    ),
    "give --train_split_ratio, the share that trains (0.9 for a val size of 0.1)": (
        "val_size split_dataset_ratio val_set_size validation_split eval_split_ratio"
    ),
    "give --dataset_config_path, the registry file itself": "dataset_dir",
    "leave it out: samples are always laid end to end without padding": (
        "packing neat_packing padding_free data_packing data_flatten sample_packing packed_sequence pack_size "
        "packing_length group_by_length length_column_name"
    ),
    'give "weight" or "max_samples" in the registry': (
        "num_samples max_samples sample_ratio mix_strategy interleave_probs interleave_prob"
    ),
    "choose a new --output_dir, or give --resume_from_checkpoint latest": "overwrite_output_dir",
    "give --max_pixels (one token is 28 x 28 pixels, for Qwen3-VL 32 x 32)": "image_max_token_num max_image_tokens",
    "give --min_pixels (one token is 28 x 28 pixels, for Qwen3-VL 32 x 32)": "image_min_token_num",
    "leave it out: video is not supported yet": (
        "video_max_pixels video_min_pixels video_fps video_maxlen fps nframes fps_max_frames "
        "video_max_token_num video_max_frames video_min_frames"
    ),
    "leave it out: the fastest attention of the device is used": (
        "attn_implementation attn_impl flash_attn flash_attention disable_flash_attn2 use_flash_attention"
    ),
    "leave it out: AdamW's betas are 0.9 and 0.999, its epsilon 1e-8": "adam_beta1 adam_beta2 adam_epsilon",
    "use accelerate launch --config_file accelerate_configs/fsdp2.yaml": "fsdp fsdp_config",
    "give --gradient_checkpointing or --no-gradient_checkpointing": "gradient_checkpointing_kwargs",
    "leave it out: there is nothing to set": (
        "remove_unused_columns dataloader_pin_memory dataloader_drop_last ddp_find_unused_parameters lazy_preprocess"
    ),
    "upload output_dir/model after the run": "push_to_hub hub_model_id",
    "give --metric_for_best": "load_best_model_at_end",
}
"""What to do here -> names elsewhere, where it is not just another name."""

RIVALS: dict[str, str] = {
    **{name: f"use --{option}" for option, names in _SAME.items() for name in names.split()},
    **{name: advice for advice, names in _TOLD.items() for name in names.split()},
}
"""Name elsewhere -> advice, a clause that begins with a verb."""

ENVIRONMENT: tuple[str, ...] = ("MAX_PIXELS", "MIN_PIXELS", "IMAGE_MAX_TOKEN_NUM", "IMAGE_MIN_TOKEN_NUM")
"""Variables that ms-swift reads. vlft does not, and says so when one is set, lest it be ignored in silence."""


def nearest(name: str, names: Iterable[str]) -> str:
    """` (the nearest is 'x')` when one of `names` resembles `name`, else nothing. Ends an error's first clause."""
    return nearest_of(name, {one: one for one in names})


def nearest_of(name: str, shown: Mapping[str, object]) -> str:
    """The same of names that are shown as something else."""
    # Imported here: only a run that fails needs it.
    from rapidfuzz import fuzz, process, utils

    match = process.extractOne(name, list(shown), scorer=fuzz.ratio, processor=utils.default_process, score_cutoff=60)
    return f" (the nearest is '{shown[match[0]]}')" if match else ""
