#!/usr/bin/env bash
# Adapters on the LLM in 16 bits, the rest frozen: more memory than qlora, without its rounding.
# lora_alpha is a quarter to a half of lora_rank; usual ranks are 32, 64 and 128.
# Out of memory: qlora, then a lower --lora_rank or --max_seq_length.
# Change MODEL, OUTPUT and DATASET here or in the environment; further options go at the end:
#     examples/lora.sh --resume_from_checkpoint latest
set -euo pipefail

accelerate launch -m vlft \
    --model_name_or_path "${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}" --output_dir "${OUTPUT:-output/lora}" \
    --tuning_strategy lora --lora_rank 64 --lora_alpha 16 --lora_dropout 0.05 \
    --dataset_names "${DATASET:-invoices}" --epochs 1 \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 16 --max_seq_length 2048 \
    --learning_rate_llm 1e-4 \
    --deepspeed zero2 \
    --save_steps 200 --eval_steps 200 --use_wandb \
    "$@"
