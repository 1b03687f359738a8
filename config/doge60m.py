"""Doge-60M, 54.6M parameters, 16.8B tokens: the published recipe of the family.

    torchrun --nproc_per_node=8 train.py config/doge60m.py
"""

out_dir = "out/doge60m"
data = "data/smollm_corpus"  # python prepare_data.py --config=config/smollm_corpus.py

# shape: heads of 128 throughout the family, two query heads a key/value head, an MLP twice the width
vocab_size = 32768  # the Doge tokenizer's
hidden_size = 512
intermediate_size = 1024
num_hidden_layers = 16
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 2048
keep_window_size = 2048  # as long as the context: in training every earlier token is seen

# batch: 512 rows of 2,048 = 1M tokens a step
batch_tokens = 1048576
micro_batch_size = 16  # rows a GPU computes at once; must divide 512 / number of GPUs

# schedule: 10 % up, 80 % flat, 10 % down
max_steps = 16000
learning_rate = 6e-3  # smaller for wider models
warmup_steps = 1600
decay_steps = 1600
decay = "linear"

# AdamW, as published; optimizer = "muon" is the alternative
weight_decay = 0.01
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

log_every = 10
eval_every = 500
save_every = 500
