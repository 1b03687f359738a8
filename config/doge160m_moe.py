"""Doge-480M-MoE, 496.0M parameters: the dense Doge-160M with 9,216 experts in every layer.

It starts from the dense model's weights before their decay, at the same learning rate and without a warm-up, and at its
first step computes exactly what the dense model did.

    torchrun --nproc_per_node=8 train.py config/doge160m_moe.py --init_from=out/doge160m/stable
"""

out_dir = "out/doge160m_moe"
data = "data/smollm_corpus"

# experts: 9,216 = 96 x 96 product keys
is_moe = True
num_experts = 9216
num_experts_per_tok = 48
router_aux_loss_coef = 0.0  # as published; 0.001 is the usual weight where experts must be balanced
moe_warmup_steps = 2400  # the new parameters first; then all

# the rest as in config/doge160m.py, whose shape is that of the checkpoint
batch_tokens = 1572864
micro_batch_size = 4  # the experts' activations take memory too
max_steps = 24000
learning_rate = 4e-3
warmup_steps = 0
decay_steps = 2400
decay = "linear"
weight_decay = 0.01
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

log_every = 10
eval_every = 500
save_every = 500
