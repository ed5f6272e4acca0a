#!/usr/bin/env bash
# For new knowledge on top of what the model can do: the lower LLM layers stay, the upper ones, the vision tower and the
# projector train. 7B has 28 layers, so eight train here; fewer frozen ones learn more and forget more.
# Change MODEL, OUTPUT, DATASET and FROZEN_LAYERS here or in the environment; further options go at the end:
#     examples/partial_llm_full_vit.sh --max_steps 500
set -euo pipefail

accelerate launch -m vlft \
    --model_name_or_path "${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}" --output_dir "${OUTPUT:-output/partial_llm_full_vit}" \
    --tuning_strategy partial_llm_full_vit --llm_frozen_layers "${FROZEN_LAYERS:-20}" \
    --dataset_names "${DATASET:-invoices}" --epochs 1 \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 16 --max_seq_length 2048 \
    --learning_rate_llm 2e-5 --learning_rate_vit 1e-4 --learning_rate_projector 1e-4 \
    --deepspeed zero2 \
    --save_steps 200 --eval_steps 200 --use_wandb \
    "$@"
