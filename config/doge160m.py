"""Doge-160M, 152.7M parameters, 37.7B tokens: the published recipe of the family. config/doge20m.py gives the
reason of every line; what is not here has its value there, which is the default.

    torchrun --nproc_per_node=8 train.py config/doge160m.py
"""

out_dir = "out/doge160m"
data = "data/smollm_corpus"

vocab_size = 32768
hidden_size = 768
intermediate_size = 1536
num_hidden_layers = 24
num_attention_heads = 6
num_key_value_heads = 3

batch_tokens = 1572864  # 768 sequences of 2,048
micro_batch_size = 8
max_steps = 24000
learning_rate = 4e-3

eval_every = 500
save_every = 500
