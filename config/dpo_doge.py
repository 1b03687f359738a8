"""Doge learns what people prefer: two epochs of UltraFeedback's pairs, as published but for what is too long (left out,
where the original cut prompts off).

    python prepare_data.py --kind=preferences hf:HuggingFaceH4/ultrafeedback_binarized::train_prefs \\
        --tokenizer=out/sft_doge20m --out=data/ultrafeedback
    torchrun --nproc_per_node=8 dpo.py config/dpo_doge.py

These are the 20M's values. The learning rate is a hundredth of pretraining's, so the other sizes take one of these:

    --init_from=out/sft_doge60m  --out_dir=out/dpo_doge60m  --learning_rate=6e-5
    --init_from=out/sft_doge160m --out_dir=out/dpo_doge160m --learning_rate=4e-5 --micro_batch_tokens=16384
    --init_from=out/sft_doge320m --out_dir=out/dpo_doge320m --learning_rate=2e-5 --micro_batch_tokens=16384
"""

init_from = "out/sft_doge20m"
data = "data/ultrafeedback"
out_dir = "out/dpo_doge20m"

loss = "sigmoid"  # with its beta of 0.1
epochs = 2.0
batch_size = 128  # pairs
micro_batch_tokens = 32768  # what a GPU computes at once
sequence_length = 1024

learning_rate = 8e-5
eval_every = 100
save_every = 100
