"""Questions about built-in stories, for the tiny model: minutes on a laptop's processor."""

init_from = "out/stories"  # what `python train.py` leaves
data = "data/stories-chat"  # made on the spot: python prepare_data.py --kind=chat stories --tokenizer=out/stories

batch_size = 32
micro_batch_tokens = 2048  # what a processor's cache likes
max_steps = 750
learning_rate = 2e-3
optimizer = "muon"
freeze_embeddings = True  # or the names that only validation has are unlearned: NOTES.md

eval_answers = 200
log_every = 10
eval_every = 375
save_every = 125
