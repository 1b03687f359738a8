"""Doge-320M, 335.8M parameters, 67.1B tokens: the published recipe of the family.

    torchrun --nproc_per_node=8 train.py config/doge320m.py
"""

out_dir = "out/doge320m"
data = "data/smollm_corpus"  # python prepare_data.py --config=config/smollm_corpus.py

# shape: heads of 128 throughout the family, two query heads a key/value head, an MLP twice the width
vocab_size = 32768  # the Doge tokenizer's
hidden_size = 1024
intermediate_size = 2048
num_hidden_layers = 32
num_attention_heads = 8
num_key_value_heads = 4
max_position_embeddings = 2048
keep_window_size = 2048  # as long as the context: in training every earlier token is seen

# batch: 1024 rows of 2,048 = 2M tokens a step
batch_tokens = 2097152
micro_batch_size = 8  # rows a GPU computes at once; must divide 1024 / number of GPUs

# schedule: 10 % up, 80 % flat, 10 % down
max_steps = 32000
learning_rate = 2e-3  # smaller for wider models
warmup_steps = 3200
decay_steps = 3200
decay = "linear"

# AdamW, as published; optimizer = "muon" is the alternative
weight_decay = 0.01
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

log_every = 10
eval_every = 500
save_every = 500
