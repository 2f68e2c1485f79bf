"""Plain-torch mathematics of the policy head on one vocabulary shard.

Notation: z = logit / temperature in fp32, m = max z, s = sum exp(z - m), u = sum exp(z - m) (z - m), all over the
whole vocabulary. Then log pi(y) = z_y - m - log s and the entropy is H = log s - u / s. Sums over the shards of a
tensor-parallel group are sums of shard sums once every rank uses the same m.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shard_logits(hidden_TH: Tensor, weight_VH: Tensor, temperature: float) -> Tensor:
    """z of the shard's columns, fp32 [T, V_shard]; the product is accumulated and kept in fp32.

    A bf16 logit of size 16..32 has a step of 0.125: rounded there, a log-prob would be off by 0.06.
    """
    if hidden_TH.dtype == torch.float32 and weight_VH.dtype == torch.float32:
        logits = hidden_TH @ weight_VH.t()
    elif hidden_TH.is_cuda and hidden_TH.dtype == weight_VH.dtype:
        logits = torch.mm(hidden_TH, weight_VH.t(), out_dtype=torch.float32)
    else:
        logits = hidden_TH.float() @ weight_VH.float().t()
    return logits if temperature == 1.0 else logits.div_(temperature)


def shard_max(z_TV: Tensor) -> Tensor:
    """Largest z of the shard, fp32 [T]; -inf where the shard has no column of the vocabulary."""
    if z_TV.shape[1] == 0:
        return z_TV.new_full((z_TV.shape[0],), -torch.inf)
    return z_TV.amax(dim=1)


def shard_sums(z_TV: Tensor, max_T: Tensor, columns_TN: Tensor) -> Tensor:
    """The shard's part of everything that is summed over the group, fp32 [T, 2 + N].

    Column 0: s; column 1: u; then z - m at each of the N `columns_TN` (indices into the shard; where negative the
    column lies on another shard, or nowhere, and the part is 0).
    """
    centred = z_TV - max_T[:, None]
    weights = centred.exp()
    # exp(-inf) * -inf is 0 here: a column that can not be sampled has no part in the entropy.
    moment = (weights * centred.masked_fill(centred == -torch.inf, 0.0)).sum(dim=1)
    here = columns_TN >= 0
    if z_TV.shape[1]:
        picked = centred.gather(1, columns_TN.clamp(min=0)).masked_fill(~here, 0.0)
    else:
        picked = centred.new_zeros(columns_TN.shape)
    return torch.cat([weights.sum(dim=1, keepdim=True), moment[:, None], picked], dim=1)


def shard_gradient_(
    z_TV: Tensor,
    log_normaliser_T: Tensor,
    target_column_T: Tensor,
    entropy_T: Tensor,
    c_logprob_T: Tensor,
    c_entropy_T: Tensor | None,
    temperature: float,
) -> Tensor:
    """d/d(logit) of sum_t c_logprob_t log pi(y_t) + c_entropy_t H_t, written over `z_TV`.

    d log pi(y)/dz_j = [j = y] - p_j and dH/dz_j = -p_j (log p_j + H). `log_normaliser_T` is m + log s;
    `target_column_T` the target's column in the shard, negative where it lies elsewhere.
    """
    log_p = z_TV.sub_(log_normaliser_T[:, None])
    if c_entropy_T is None:
        gradient = log_p.exp_().mul_(-c_logprob_T[:, None])
    else:
        p = log_p.exp()
        log_p = log_p.masked_fill_(log_p == -torch.inf, 0.0)  # p is 0 there
        slope = c_logprob_T[:, None] + c_entropy_T[:, None] * (log_p + entropy_T[:, None])
        gradient = log_p.copy_(-p * slope)
    if gradient.shape[1]:
        here = c_logprob_T.masked_fill(target_column_T < 0, 0.0)
        gradient.scatter_add_(1, target_column_T.clamp(min=0)[:, None], here[:, None])
    return gradient if temperature == 1.0 else gradient.div_(temperature)
