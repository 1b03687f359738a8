"""Doge-20M, 13.1M parameters, 4.2B tokens: the published recipe of the family. The larger sizes
differ in the numbers; the reason of every line is here.

    torchrun --nproc_per_node=8 train.py config/doge20m.py
"""

out_dir = "out/doge20m"
data = "data/smollm_corpus"  # python prepare_data.py --config=config/smollm_corpus.py

# shape: heads of 128 throughout the family, two query heads per key/value head, an MLP twice the width
vocab_size = 32768  # the Doge tokenizer's
hidden_size = 256
intermediate_size = 512
num_hidden_layers = 8
num_attention_heads = 2
num_key_value_heads = 1
max_position_embeddings = 2048
keep_window_size = 2048  # as long as the context: in training every earlier token is visible

# batch: 256 sequences of 2,048 = 0.5M tokens per step
batch_tokens = 524288
micro_batch_size = 16  # sequences a GPU computes at once; must divide 256 / number of GPUs

# schedule: 10 % up, 80 % flat, 10 % down
max_steps = 8000
learning_rate = 8e-3  # smaller for wider models
warmup_steps = 0.1  # a number below 1 is a share of max_steps: --max_steps=80 shortens every phase
decay_steps = 0.1
decay = "linear"

# AdamW, as published; optimizer = "muon" is the alternative
weight_decay = 0.01
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

eval_every = 500
save_every = 500
