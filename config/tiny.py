"""A Doge for a laptop's CPU: five and a half minutes on two cores, on the built-in stories. NOTES.md says what else
was tried in its place."""

data = "data/stories"  # or any other (on the stories, half of the steps learn only copies): the run goes to out/NAME

# shape: the family's proportions (MLP twice the width, two query heads per key/value head) at half the 20M's width
hidden_size = 128
intermediate_size = 256
num_hidden_layers = 4
num_attention_heads = 2  # heads of 64: with heads of 32 the loss was no lower
num_key_value_heads = 1
max_position_embeddings = 256  # a story and a bit

# batch: small, since a run of minutes is short of steps; not smaller, since Muon's work is the same at any size
micro_batch_size = 8
batch_tokens = 4096  # 16 sequences of 256

# schedule: the peak that suits Muon here; the decay takes the last third, where much of the gain is
optimizer = "muon"
learning_rate = 6e-3
max_steps = 0  # six epochs, at most 600 steps: so many on the built-in stories, 440 on a text of 1 MB
warmup_steps = 0.025
decay_steps = 0.333
decay = "1-sqrt"

eval_every = 150
eval_tokens = 65536
save_every = 150
