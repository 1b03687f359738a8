"""The tiny model learns to work out sums step by step, between the thought tags: a start for grpo.py, in a minute."""

init_from = "out/stories-chat"  # what `python sft.py` leaves
data = "data/sums-chat"  # made on the spot: python prepare_data.py --kind=chat sums --tokenizer=out/stories-chat

batch_rows = 32
micro_tokens = 2048
learning_rate = 3e-3
optimizer = "muon"

eval_answers = 200
log_every = 10
eval_every = 100
save_every = 100
