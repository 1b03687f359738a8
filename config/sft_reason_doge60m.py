"""Doge-60M learns to think before it answers, from the thoughts of a larger model (OpenThoughts-114k).

    python prepare_data.py --kind=chat hf:open-thoughts/OpenThoughts-114k --tokenizer=out/sft_doge60m
    torchrun --nproc_per_node=8 sft.py config/sft_reason_doge60m.py

Thoughts are long. Rows of 4,096 are twice what the model was made for: its window keeps the 2,048 keys that count, and
longer ones than that are left out and counted, for a thought without its solution is no lesson.
"""

init_from = "out/sft_doge60m"
data = "data/OpenThoughts-114k-chat"
out_dir = "out/reason_doge60m"

epochs = 2.0
batch_size = 128
micro_batch_tokens = 32768
sequence_length = 4096

learning_rate = 6e-4
warmup = 0.1

log_every = 10
eval_every = 200
save_every = 200
