#!/usr/bin/env bash
# For seeing alone: vision tower and projector train, the LLM stays as it is.
# Augmentation makes the tower less sensitive to light, colour and blur; --augmentation geometric also flips and crops
# (docs/augmentation.md), and boxes move along.
# Change MODEL, OUTPUT and DATASET here or in the environment; further options go at the end:
#     examples/vit_only.sh --resume_from_checkpoint latest
set -euo pipefail

accelerate launch -m vlft \
    --model_name_or_path "${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}" --output_dir "${OUTPUT:-output/vit_only}" \
    --tuning_strategy vit_only \
    --dataset_names "${DATASET:-invoices}" --epochs 1 \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --max_seq_length 2048 \
    --learning_rate_vit 1e-4 --learning_rate_projector 1e-4 \
    --use_data_augmentation --augmentation photometric \
    --deepspeed zero2 \
    --save_steps 200 --eval_steps 200 --use_wandb \
    "$@"
