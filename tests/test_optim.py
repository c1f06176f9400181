"""Adam-atan2 against its formulas, and the moving average."""

import pytest
import torch
from conftest import tiny_model

from optim import AdamATan2, MovingAverage


def test_the_update_is_that_of_the_formulas():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = AdamATan2([p], lr=0.1, betas=(0.9, 0.95), weight_decay=0.2)
    weight, m, v = p.detach().clone().double(), 0, 0
    for t, grad in enumerate(([0.5, -1.0], [0.1, 3.0], [0.0, 1e-9]), 1):
        p.grad = torch.tensor(grad)
        optimizer.step()
        g = p.grad.double()
        m = 0.9 * m + 0.1 * g
        v = 0.95 * v + 0.05 * g * g
        direction = torch.atan2(m, (v / (1 - 0.95**t)).sqrt())
        weight = weight * (1 - 0.1 * 0.2) - 0.1 / (1 - 0.9**t) * direction
        torch.testing.assert_close(p.detach().double(), weight, rtol=1e-6, atol=1e-7)


def test_a_weight_without_gradient_is_left_alone():
    p = torch.nn.Parameter(torch.ones(3))
    AdamATan2([p], lr=0.1).step()
    assert p.tolist() == [1, 1, 1]


@pytest.mark.slow
def test_compiled_it_is_the_same():
    results = []
    for compile in False, True:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n, 8)) for n in (3, 5)]
        optimizer = AdamATan2(params, lr=0.1, compile=compile)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append(params)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_the_average_follows_the_weights():
    model = tiny_model()
    average = MovingAverage(model)
    before = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight += 1
    average.update(0.75)
    with average.in_use():
        torch.testing.assert_close(model.lm_head.weight, before + 0.25)
    torch.testing.assert_close(model.lm_head.weight, before + 1)
