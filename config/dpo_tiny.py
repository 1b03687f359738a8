"""The tiny model learns which answer about a built-in story is the better one: minutes on a laptop's CPU."""

init_from = "out/stories-chat"  # what `python sft.py` leaves
data = "data/stories-preferences"  # made on the spot: python prepare_data.py --kind=preferences stories --tokenizer=...

batch_size = 32  # pairs
micro_batch_tokens = 2048  # fits a CPU's cache
max_steps = 100
learning_rate = 3e-4
freeze_embeddings = True  # as in sft_tiny.py

eval_every = 50
save_every = 25
