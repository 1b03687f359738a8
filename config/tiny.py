"""A Doge for a laptop's processor: trained in about four minutes on two cores, on the built-in stories."""

out_dir = "out/tiny"
data = "data/stories"

# the model: the family's proportions (MLP twice the width, half as many key/value heads), heads of 64 for the width
hidden_size = 128
intermediate_size = 256
num_hidden_layers = 4
num_attention_heads = 2
num_key_value_heads = 1
max_position_embeddings = 256  # a story and a half

# one pass: 4,096 tokens a step
batch_size = 16
batch_tokens = 4096
max_steps = 1000
learning_rate = 4e-3
warmup_steps = 100
decay_steps = 300
decay = "1-sqrt"

eval_tokens = 32768
eval_every = 200
save_every = 200
