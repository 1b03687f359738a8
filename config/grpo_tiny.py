"""The tiny model tries sums and is told what was right: minutes on a laptop's CPU. Counting is more often right than
guessing, so its answers become longer, and right."""

init_from = "out/sums-chat"  # what `python sft.py config/sft_reason_tiny.py` leaves
data = "data/sums-problems"  # made on the spot: python prepare_data.py --kind=problems sums --tokenizer=out/sums-chat

batch_size = 16  # problems
generations = 8  # answers to each
max_new_tokens = 96  # the longest right answer has 77
slots = 64  # answers that are written at once
micro_batch_tokens = 2048  # fits a CPU's cache
max_steps = 20
learning_rate = 2e-4

log_every = 1
eval_every = 5
save_every = 10
