"""Which answer about a built-in story is the better one, for the tiny model: minutes on a laptop's processor."""

init_from = "out/stories-chat"  # what `python sft.py` leaves
data = "data/stories-preferences"  # made on the spot: python prepare_data.py --kind=preferences stories --tokenizer=...

batch_rows = 32  # pairs
micro_tokens = 2048  # what a processor's cache likes
learning_rate = 3e-4  # a tenth of what sft.py took

log_every = 10
eval_every = 50
save_every = 50
