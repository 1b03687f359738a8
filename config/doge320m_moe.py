"""Doge-1.4B-MoE, 1,417.9M parameters: the dense Doge-320M with 16,384 experts in every layer.

It starts from the dense model's weights before their decay, at the same learning rate and without a warm-up, and at its
first step computes exactly what the dense model did. Weights, gradients and Adam's moments take 23 GB a GPU; --shard
divides them by the number of GPUs.

    torchrun --nproc_per_node=8 train.py config/doge320m_moe.py --init_from=out/doge320m/stable
"""

out_dir = "out/doge320m_moe"
data = "data/smollm_corpus"

# experts: 16,384 = 128 x 128 product keys
is_moe = True
num_experts = 16384
num_experts_per_tok = 64
router_aux_loss_coef = 0.0  # as published; 0.001 is the usual weight where experts must be balanced
moe_warmup_steps = 3200  # the new parameters first; then all

# the rest as in config/doge320m.py, whose shape is that of the checkpoint
batch_tokens = 2097152
micro_batch_size = 4  # the experts' activations take memory too
max_steps = 32000
learning_rate = 2e-3
warmup_steps = 0
decay_steps = 3200
decay = "linear"
weight_decay = 0.01
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

log_every = 10
eval_every = 500
save_every = 500
