"""The tiny model learns how sums are worked out, between the thought tags: two times in five step by step, else by a
hasty guess. So it mostly guesses, though it has learned to count. That counting pays is left for grpo.py."""

init_from = "out/stories-chat"  # what `python sft.py` leaves
data = "data/sums-chat"  # made on the spot: python prepare_data.py --kind=chat sums --tokenizer=out/stories-chat

batch_size = 32  # conversations
micro_batch_tokens = 2048
max_steps = 350
learning_rate = 6e-3
optimizer = "muon"

eval_answers = 200
eval_every = 175
save_every = 175
