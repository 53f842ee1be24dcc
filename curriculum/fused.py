"""Operations whose gradient is made by hand: on a CPU, what costs is passes over memory, and autograd makes many.

Measured on the demo preset, CPU time of one core for a step: see LOG.md, 2026-11-21. On CUDA the compiler fuses what is
written plainly; there only the head, too large to be held, keeps to its own path.

Shapes: T tokens   D model_dim   V vocabulary   K tokens ahead   N rows of a block
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


@cache
def compiled(function):
    """For CUDA; on a CPU it gains 1.1 to 1.5 times and costs 10 s at every start."""
    return torch.compile(function, dynamic=False)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Weights are kept in fp32 and used in the type of the activations: fp32 on CPU, bf16 on CUDA."""
    return F.linear(x, weight.type_as(x), None if bias is None else bias.type_as(x))


def norm(x: Tensor, gain: Tensor | None = None) -> Tensor:
    """RMSNorm over the last dimension."""
    y = F.rms_norm(x, x.shape[-1:]) if x.is_cuda else Norm.apply(x)
    return y if gain is None else y * gain.type_as(y)


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(torch.finfo(x.dtype).eps).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, along, value=-1).mul_(scale)


def relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square() if x.is_cuda else ReluSquared.apply(x)


class ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, grad):
        (positive,) = ctx.saved_tensors
        return (grad * positive).mul_(2)


class HeadLoss(torch.autograd.Function):
    """Head, softcap and cross-entropy, a block of rows at a time, with the gradient made on the way.

    The [T, V] logits are the largest thing in a small model. In blocks they stay in a CPU's cache and are never held
    whole; the gradient costs no second pass over them.
    """

    @staticmethod
    def forward(ctx, hidden_TD, head_VD, bias_V, target_KT, weight_K, cap):
        wants_grad = any(ctx.needs_input_grad)
        block_rows = 256 if hidden_TD.device.type == "cpu" else 8192
        nll_T = hidden_TD.new_empty(len(hidden_TD), dtype=torch.float32)
        grad_hidden_TD = torch.empty_like(hidden_TD) if wants_grad else None
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if wants_grad else None
        grad_bias_V = torch.zeros_like(bias_V) if wants_grad and bias_V is not None else None
        block = compiled(block_loss) if hidden_TD.is_cuda else block_loss
        for at in range(0, len(hidden_TD), block_rows):
            rows = slice(at, at + block_rows)
            logits_NV = linear(hidden_TD[rows], head_VD, bias_V)
            nll_T[rows], grad_NV = block(logits_NV, target_KT[:, rows], weight_K, cap, wants_grad)
            if wants_grad:
                grad_hidden_TD[rows] = grad_NV @ head_VD
                grad_head_VD += grad_NV.T @ hidden_TD[rows]
                if bias_V is not None:
                    grad_bias_V += grad_NV.sum(0, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden_TD, grad_head_VD, grad_bias_V)
        return nll_T

    @staticmethod
    def backward(ctx, grad_T):
        # Every token weighs the same: the trainer's loss is a sum over tokens times a scalar.
        grads = [None if grad is None else grad * grad_T[0].type_as(grad) for grad in ctx.saved_tensors]
        return *grads, None, None, None


def block_loss(
    logits_NV: Tensor, target_KN: Tensor, weight_K: Tensor, cap: float, wants_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of the next token of N rows (fp32), and the gradient of the weighted losses of all K tokens ahead
    with respect to the uncapped logits, in their type.

    The softcap of `curriculum.moments` is z = x u with u = (1 + x^2/c^2)^-1/2, and dz/dx = u^3. Capped logits need no
    shift before the exponential: e^z lies in e^-c .. e^c, and fp32 goes to e^88.
    """
    z_NV = logits_NV.float()
    if cap:
        u_NV = torch.addcmul(z_NV.new_ones(()), z_NV, z_NV, value=cap**-2).rsqrt_()
        z_NV = z_NV * u_NV
    if not 0 < cap < 60:
        z_NV = z_NV - z_NV.amax(1, keepdim=True)
    index_NK = target_KN.T.clamp(min=0)
    target_N1 = z_NV.gather(1, index_NK[:, :1])
    exp_NV = z_NV.exp_()
    sum_N1 = exp_NV.sum(1, keepdim=True)
    nll_N = (sum_N1.log() - target_N1)[:, 0] * (target_KN[0] >= 0)
    if not wants_grad:
        return nll_N, None
    weight_NK = weight_K * (target_KN.T >= 0)
    # The softmax, times what all its losses weigh; on a CPU that is 1 (rows are filled up on CUDA only) unless K > 1.
    plain = len(weight_K) == 1 and not logits_NV.is_cuda
    grad_NV = exp_NV.mul_(sum_N1.reciprocal() if plain else weight_NK.sum(1, keepdim=True) / sum_N1)
    grad_NV.scatter_add_(1, index_NK, -weight_NK)
    if cap:
        grad_NV.mul_(u_NV).mul_(u_NV).mul_(u_NV)
    return nll_N, grad_NV.type_as(logits_NV)
