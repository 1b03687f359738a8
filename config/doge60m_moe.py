"""Doge-120M-MoE, 122.7M parameters: the dense Doge-60M with 4,096 experts in every layer,
as config/doge20m_moe.py explains.

    torchrun --nproc_per_node=8 train.py config/doge60m_moe.py --init_from=out/doge60m/stable
"""

out_dir = "out/doge60m_moe"
data = "data/smollm_corpus"

is_moe = True
num_experts = 4096  # 64 x 64 product keys
num_experts_per_tok = 32
moe_warmup_steps = 0.1
warmup_steps = 0
micro_batch_size = 8
