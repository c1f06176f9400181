"""
Adam-atan2 (Everett et al. 2024) with decoupled weight decay, and the moving average of the weights.

atan2 takes the place of Adam's division: it needs no epsilon, and it bounds every update. The
average stands apart from the optimizer, so any torch.optim.Optimizer can take AdamATan2's place.
"""

from contextlib import contextmanager

import torch


def adam_atan2(p, grad, m, v, lr, correction1, correction2, beta1, beta2, weight_decay):
    """One step on one tensor, in place. The corrections are 1 - beta**t."""
    p.mul_(1 - lr * weight_decay)
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    p.sub_(torch.atan2(m, (v / correction2).sqrt()) * (lr / correction1))


class AdamATan2(torch.optim.Optimizer):
    """A parameter without a gradient is left alone. compile: a step is one pass over memory."""

    def __init__(self, params, lr, betas=(0.9, 0.95), weight_decay=0.1, compile=False):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))
        self.update = torch.compile(adam_atan2, dynamic=True) if compile else adam_atan2

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            numbers = {}  # of a step t, as tensors: each new number would be compiled anew
            for p in group["params"]:
                if p.grad is None:  # with 2 bp_steps, the embedding has none
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=torch.zeros(()), m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["step"] += 1
                t = state["step"].item()
                if t not in numbers:
                    values = group["lr"], 1 - beta1**t, 1 - beta2**t
                    numbers[t] = [torch.full((), x, device=p.device) for x in values]  # no wait
                tensors = p.detach(), p.grad, state["m"], state["v"]
                flat = [x.view(-1) for x in tensors]  # all shapes share one compilation
                self.update(*flat, *numbers[t], beta1, beta2, group["weight_decay"])


class MovingAverage:
    """The exponential moving average (EMA) of a model's weights: what is evaluated and exported."""

    def __init__(self, model):
        self.model = model
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, decay):
        """After a step: average = decay * average + (1 - decay) * weights."""
        weights = [p.detach() for p in self.model.parameters()]
        torch._foreach_lerp_(list(self.tensors.values()), weights, 1 - decay)

    @contextmanager
    def in_use(self):
        """Inside, the model has the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self):
        for name, p in self.model.named_parameters():
            p.data, self.tensors[name] = self.tensors[name], p.data
