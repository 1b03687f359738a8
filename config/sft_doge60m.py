"""Doge-60M learns to answer: two epochs of smoltalk, as published but for what is learned (only the answers).

    python prepare_data.py --kind=chat hf:HuggingFaceTB/smoltalk:all --tokenizer=out/doge60m --out=data/smoltalk
    torchrun --nproc_per_node=8 sft.py config/sft_doge60m.py
"""

init_from = "out/doge60m"
data = "data/smoltalk"
out_dir = "out/sft_doge60m"

epochs = 2.0
batch_size = 256  # conversations; with some 1,000 tokens in each, the published 0.25M tokens a step
micro_batch_tokens = 32768  # what a GPU computes at once
sequence_length = 2048

learning_rate = 6e-4  # a tenth of pretraining's
warmup = 0.1

log_every = 10
eval_every = 200
save_every = 200
