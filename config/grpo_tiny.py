"""The tiny model tries sums and is told what was right: minutes on a laptop's processor. In these few steps it has not
become better yet (NOTES.md): take it as a look at the machinery."""

init_from = "out/sums-chat"  # what `python sft.py config/sft_reason_tiny.py` leaves
data = "data/sums-problems"  # made on the spot: python prepare_data.py --kind=problems sums --tokenizer=out/sums-chat

batch_rows = 16  # problems
generations = 8  # answers to each
max_new_tokens = 96  # the longest right answer has some 60
rollout_rows = 64
micro_tokens = 2048  # what a processor's cache likes

max_steps = 40
learning_rate = 1e-4  # 3e-4 and 5e-4 made it worse
warmup = 0.1

log_every = 1
eval_every = 10
save_every = 10
