"""Doge-60M, 54.6M parameters, 16.8B tokens: the published recipe of the family. config/doge20m.py gives the
reason of every line; what is not here has its value there, which is the default.

    torchrun --nproc_per_node=8 train.py config/doge60m.py
"""

out_dir = "out/doge60m"
data = "data/smollm_corpus"

vocab_size = 32768
hidden_size = 512
intermediate_size = 1024
num_hidden_layers = 16
num_attention_heads = 4
num_key_value_heads = 2

batch_tokens = 1048576  # 512 sequences of 2,048
micro_batch_size = 16
max_steps = 16000
learning_rate = 6e-3

eval_every = 500
save_every = 500
