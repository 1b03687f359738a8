"""Doge-480M-MoE, 496.0M parameters: the dense Doge-160M with 9,216 experts in every layer,
as config/doge20m_moe.py explains.

    torchrun --nproc_per_node=8 train.py config/doge160m_moe.py --init_from=out/doge160m/stable
"""

out_dir = "out/doge160m_moe"
data = "data/smollm_corpus"

is_moe = True
num_experts = 9216  # 96 x 96 product keys
num_experts_per_tok = 48
moe_warmup_steps = 0.1
warmup_steps = 0
micro_batch_size = 4
