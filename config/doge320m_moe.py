"""Doge-1.4B-MoE, 1,417.9M parameters: the dense Doge-320M with 16,384 experts in every layer,
as config/doge20m_moe.py explains. Weights, gradients and Adam's moments take 23 GB per GPU;
--shard divides them by the number of GPUs.

    torchrun --nproc_per_node=8 train.py config/doge320m_moe.py --init_from=out/doge320m/stable
"""

out_dir = "out/doge320m_moe"
data = "data/smollm_corpus"

is_moe = True
num_experts = 16384  # 128 x 128 product keys
num_experts_per_tok = 64
moe_warmup_steps = 0.1
warmup_steps = 0
micro_batch_size = 4
