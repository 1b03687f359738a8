"""Doge-320M, 335.8M parameters, 67.1B tokens: the published recipe of the family. config/doge20m.py gives the
reason of every line; what is not here has its value there, which is the default.

    torchrun --nproc_per_node=8 train.py config/doge320m.py
"""

out_dir = "out/doge320m"
data = "data/smollm_corpus"

vocab_size = 32768
hidden_size = 1024
intermediate_size = 2048
num_hidden_layers = 32
num_attention_heads = 8
num_key_value_heads = 4

batch_tokens = 2097152  # 1,024 sequences of 2,048
micro_batch_size = 8
max_steps = 32000
learning_rate = 2e-3

eval_every = 500
save_every = 500
