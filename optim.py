"""The optimizer: Adam-atan2 with decoupled weight decay, which also keeps a moving average of the weights (EMA)."""

from contextlib import contextmanager

import torch

from devices import compiled


def adam_atan2(p, grad, m, v, ema, lr, correction1, correction2, ema_rate, beta1, beta2, weight_decay):
    """One step on one tensor, in place. The corrections are 1 - beta**t, ema_rate 1 - its decay; ema may be None."""
    p.mul_(1 - lr * weight_decay)
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    p.sub_(torch.atan2(m, (v / correction2).sqrt()) * (lr / correction1))
    if ema is not None:
        ema.lerp_(p, ema_rate)


class AdamATan2(torch.optim.Optimizer):
    """Adam with atan2 in place of the division (Everett et al. 2024), which needs no epsilon and bounds every update,
    and, if `ema` is a decay rate, the weights' moving average. A parameter without gradient is left untouched.
    compile: a step is one pass over memory, which on a CPU takes a quarter of the time."""

    def __init__(self, params, lr, betas=(0.9, 0.95), weight_decay=0.1, ema=None, compile=False):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, ema=ema))
        self.update = compiled(adam_atan2, dynamic=True) if compile else adam_atan2
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                if ema is not None:
                    self.state[p]["ema"] = p.detach().clone()

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (beta1, beta2), scalars = group["betas"], {}
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                t = state["step"] = state["step"] + 1
                if t not in scalars:  # as tensors: a new number would be compiled anew; full() does not wait
                    numbers = group["lr"], 1 - beta1**t, 1 - beta2**t, 1 - (group["ema"] or 0)
                    scalars[t] = [torch.full((), x, device=p.device) for x in numbers]
                tensors = p.detach(), p.grad, state["m"], state["v"], state.get("ema")
                flat = (x if x is None else x.view(-1) for x in tensors)  # so that all shapes share one compilation
                self.update(*flat, *scalars[t], beta1, beta2, group["weight_decay"])

    def keep_average(self, keep):
        """Start the moving average at the weights where there is none, or drop it."""
        for p, state in self.state.items():
            if keep:
                state.setdefault("ema", p.detach().clone())
            else:
                state.pop("ema", None)

    @contextmanager
    def averaged(self):
        """Inside, the parameters hold their moving averages, where there are any."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self):
        for p, state in self.state.items():
            if "ema" in state:
                p.data, state["ema"] = state["ema"], p.data
