"""The tiny model learns to answer questions about built-in stories: minutes on a laptop's CPU."""

init_from = "out/stories"  # what `python train.py` leaves
data = "data/stories-chat"  # made on the spot: python prepare_data.py --kind=chat stories --tokenizer=out/stories

batch_size = 36  # conversations
micro_batch_tokens = 2048  # fits a CPU's cache
max_steps = 750
learning_rate = 2e-3
optimizer = "muon"
freeze_embeddings = True  # else the names that occur only in validation are unlearned: NOTES.md

eval_answers = 200
eval_every = 375
save_every = 125
