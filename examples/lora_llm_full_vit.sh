#!/usr/bin/env bash
# For finer seeing (small objects, text in pictures): adapters on the LLM, all weights of vision tower and projector.
# The nearer a part is to the picture, the higher its rate may be.
# Change MODEL, OUTPUT and DATASET here or in the environment; further options go at the end:
#     examples/lora_llm_full_vit.sh --use_data_augmentation
set -euo pipefail

accelerate launch -m vlft \
    --model_name_or_path "${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}" --output_dir "${OUTPUT:-output/lora_llm_full_vit}" \
    --tuning_strategy lora_llm_full_vit --lora_rank 64 --lora_alpha 16 --lora_dropout 0.05 \
    --dataset_names "${DATASET:-invoices}" --epochs 1 \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 16 --max_seq_length 2048 \
    --learning_rate_llm 1e-4 --learning_rate_vit 2e-4 --learning_rate_projector 2e-4 \
    --deepspeed zero2 \
    --save_steps 200 --eval_steps 200 --use_wandb \
    "$@"
