#!/usr/bin/env bash
# All weights: the best result where there is memory for it, four to eight GPUs of 80 GB for 7B.
# ZeRO-3 cuts up the weights, too. A low rate for the LLM keeps it from forgetting.
# The recipe of the Qwen authors leaves the vision tower: replace --learning_rate_vit 1e-4 by --no-train_vit.
# Change MODEL, OUTPUT and DATASET here or in the environment; further options go at the end:
#     examples/full.sh --resume_from_checkpoint latest
set -euo pipefail

accelerate launch -m vlft \
    --model_name_or_path "${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}" --output_dir "${OUTPUT:-output/full}" \
    --tuning_strategy full \
    --dataset_names "${DATASET:-invoices}" --epochs 1 \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 16 --max_seq_length 2048 \
    --learning_rate_llm 2e-5 --learning_rate_vit 1e-4 --learning_rate_projector 1e-4 \
    --deepspeed zero3 \
    --save_steps 200 --eval_steps 200 --use_wandb \
    "$@"
