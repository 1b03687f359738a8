"""Doge learns to answer: two epochs of smoltalk, as published but for what is learned (only the answers).

    python prepare_data.py --kind=chat hf:HuggingFaceTB/smoltalk:all --tokenizer=out/doge20m --out=data/smoltalk
    torchrun --nproc_per_node=8 sft.py config/sft_doge.py

These are the 20M's values. The learning rate is a tenth of pretraining's, so the other sizes take one of these lines:

    --init_from=out/doge60m  --out_dir=out/sft_doge60m  --learning_rate=6e-4
    --init_from=out/doge160m --out_dir=out/sft_doge160m --learning_rate=4e-4 --micro_batch_tokens=16384
    --init_from=out/doge320m --out_dir=out/sft_doge320m --learning_rate=2e-4 --micro_batch_tokens=16384
"""

init_from = "out/doge20m"
data = "data/smoltalk"
out_dir = "out/sft_doge20m"

epochs = 2.0
batch_size = 256  # conversations; with some 1,000 tokens in each, the published 0.25M tokens per step
micro_batch_tokens = 32768  # what a GPU computes at once
sequence_length = 2048

learning_rate = 8e-4
eval_every = 200
save_every = 200
