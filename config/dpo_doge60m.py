"""Doge-60M learns what people prefer: two epochs of UltraFeedback's pairs, as published but for what is too long (left
out, where the original cut prompts off).

    python prepare_data.py --kind=preferences hf:HuggingFaceH4/ultrafeedback_binarized::train_prefs \
        --tokenizer=out/sft_doge60m --out=data/ultrafeedback
    torchrun --nproc_per_node=8 dpo.py config/dpo_doge60m.py
"""

init_from = "out/sft_doge60m"
data = "data/ultrafeedback"
out_dir = "out/dpo_doge60m"

loss = "sigmoid"  # with its beta of 0.1
epochs = 2.0
batch_size = 128  # pairs
micro_batch_tokens = 32768  # what a GPU computes at once
sequence_length = 1024

learning_rate = 6e-5  # a hundredth of pretraining's
warmup = 0.1

log_every = 10
eval_every = 100
save_every = 100
