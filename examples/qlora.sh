#!/usr/bin/env bash
# The first choice: adapters on a 4-bit LLM take the least memory and come close to a full fine-tuning.
# The vision tower and the projector can train beside them, in full precision: add --train_vit.
# Out of memory: batch size 1 and accumulation 16, then --lora_rank 32, then a lower --max_seq_length.
# Change MODEL, OUTPUT and DATASET here or in the environment; further options go at the end:
#     examples/qlora.sh --train_vit
set -euo pipefail

accelerate launch -m vlft \
    --model_name_or_path "${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}" --output_dir "${OUTPUT:-output/qlora}" \
    --tuning_strategy qlora --lora_rank 64 --lora_alpha 16 --lora_dropout 0.05 \
    --dataset_names "${DATASET:-invoices}" --epochs 1 \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --max_seq_length 2048 \
    --learning_rate_llm 1e-4 \
    --deepspeed zero2 \
    --save_steps 200 --eval_steps 200 --use_wandb \
    "$@"
