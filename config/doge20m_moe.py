"""Doge-20M-MoE, 17.4M parameters: the dense Doge-20M with 1,024 experts in every layer.

It starts from the dense model's weights before their decay, at the same learning rate and without a warm-up, and at its
first step computes exactly what the dense model did.

    torchrun --nproc_per_node=8 train.py config/doge20m_moe.py --init_from=out/doge20m/stable
"""

out_dir = "out/doge20m_moe"
data = "data/smollm_corpus"

# experts: 1,024 = 32 x 32 product keys
is_moe = True
num_experts = 1024
num_experts_per_tok = 16
router_aux_loss_coef = 0.0  # as published; 0.001 is the usual weight where experts must be balanced
moe_warmup_steps = 800  # the new parameters first; then all

# the rest as in config/doge20m.py, whose shape is that of the checkpoint
batch_tokens = 524288
micro_batch_size = 8  # the experts' activations take memory too
max_steps = 8000
learning_rate = 8e-3
warmup_steps = 0
decay_steps = 800
decay = "linear"
weight_decay = 0.01
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

log_every = 10
eval_every = 500
save_every = 500
