"""Doge-20M gets better at word problems by trying: GSM8K, whose answers are numbers, so that they can be checked.

    python prepare_data.py --kind=problems hf:openai/gsm8k:main --out=data/gsm8k-problems \\
        --tokenizer=out/reason_doge20m
    torchrun --nproc_per_node=8 grpo.py config/grpo_doge20m.py

Learning rate, answers a problem, and lengths (512 tokens of problem, 1,024 of answer) are the published ones; published
with them was OpenR1-Math-220k, many of whose answers are formulas, which are right here only if they are the same text.
"""

init_from = "out/reason_doge20m"
data = "data/gsm8k-problems"
out_dir = "out/grpo_doge20m"

epochs = 4.0
batch_size = 128  # problems
generations = 8  # answers to each
sequence_length = 1536
max_new_tokens = 1024
slots = 128  # what a GPU writes at once: 1,024 answers are eight pieces
micro_batch_tokens = 32768  # what a GPU learns from at once

learning_rate = 8e-5  # a hundredth of pretraining's
warmup = 0.1

log_every = 1
eval_every = 20
save_every = 20
