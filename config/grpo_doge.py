"""Doge gets better at word problems by trying: GSM8K, whose answers are numbers, so that they can be checked.

    python prepare_data.py --kind=problems hf:openai/gsm8k:main --out=data/gsm8k-problems \\
        --tokenizer=out/reason_doge20m
    torchrun --nproc_per_node=8 grpo.py config/grpo_doge.py

Learning rate, answers per problem, and lengths (512 tokens of problem, 1,024 of answer) are the published ones. The
published data was OpenR1-Math-220k: many of its answers are formulas, right only if they are the same text.

These are the 20M's values. The learning rate is a hundredth of pretraining's, so the other sizes take one of these:

    --init_from=out/reason_doge60m  --out_dir=out/grpo_doge60m  --learning_rate=6e-5
    --init_from=out/reason_doge160m --out_dir=out/grpo_doge160m --learning_rate=4e-5 --micro_batch_tokens=16384
    --init_from=out/reason_doge320m --out_dir=out/grpo_doge320m --learning_rate=2e-5 --micro_batch_tokens=16384
"""

init_from = "out/reason_doge20m"
data = "data/gsm8k-problems"
out_dir = "out/grpo_doge20m"

epochs = 4.0
batch_size = 128  # problems
generations = 8  # answers to each
sequence_length = 1536
max_new_tokens = 1024
slots = 128  # answers a GPU writes at once, as many as its memory holds (320M: 64)
micro_batch_tokens = 32768  # what a GPU learns from at once

learning_rate = 8e-5
log_every = 1
eval_every = 20
save_every = 20
