"""Doge learns to think before it answers, from the thoughts of a larger model (OpenThoughts-114k).

    python prepare_data.py --kind=chat hf:open-thoughts/OpenThoughts-114k --tokenizer=out/sft_doge20m
    torchrun --nproc_per_node=8 sft.py config/sft_reason_doge.py

Thoughts are long. Sequences of 4,096 are twice as long as in pretraining: each query sees the 2,048 keys of largest
score. Longer conversations are left out and counted, since a thought without its solution teaches nothing.

These are the 20M's values. The other sizes:

    --init_from=out/sft_doge60m  --out_dir=out/reason_doge60m  --learning_rate=6e-4
    --init_from=out/sft_doge160m --out_dir=out/reason_doge160m --learning_rate=4e-4 --micro_batch_tokens=16384
    --init_from=out/sft_doge320m --out_dir=out/reason_doge320m --learning_rate=2e-4 --micro_batch_tokens=16384
"""

init_from = "out/sft_doge20m"
data = "data/OpenThoughts-114k-chat"
out_dir = "out/reason_doge20m"

epochs = 2.0
batch_size = 128
micro_batch_tokens = 32768
sequence_length = 4096

learning_rate = 8e-4
eval_every = 200
save_every = 200
