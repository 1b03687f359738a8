"""Doge-20M-MoE, 17.4M parameters: the dense Doge-20M with 1,024 experts in every layer.

It starts from the dense model's weights before their decay, at the same learning rate and without a warm-up, and at its
first step computes exactly what the dense model did. Shape, batch and schedule are those of the dense model's recipe,
which its checkpoint carries. (From a checkpoint that has none, such as a converted one: `train.py config/doge20m.py
config/doge20m_moe.py --init_from=...`.)

    torchrun --nproc_per_node=8 train.py config/doge20m_moe.py --init_from=out/doge20m/stable
"""

out_dir = "out/doge20m_moe"
data = "data/smollm_corpus"

is_moe = True
num_experts = 1024  # 32 x 32 product keys
num_experts_per_tok = 16
router_aux_loss_coef = 0.0  # as published; 0.001 is the usual weight where experts must be balanced
moe_warmup_steps = 0.1  # the new parameters first; then all
warmup_steps = 0
micro_batch_size = 8  # half the dense model's: the experts' activations take memory too
