"""The engine gives the answers of the plain way, whatever is beside a prompt."""

import pytest
import torch
from conftest import documents, tiny_model

from generate import choose, choose_device, generate, load_for_inference, stream
from model import RECURRENCES

PROMPTS = [ids[:p].tolist() for ids, p in documents((5, 1), (30, 1), (1, 1), (9, 1), (80, 1))]


@pytest.mark.parametrize("recurrence", RECURRENCES)
@pytest.mark.parametrize("changes", [{}, {"norm": "post"}, {"prefix_lm": False}])
def test_the_engine_equals_the_plain_way(recurrence, changes):
    model = tiny_model(recurrence=recurrence, **changes)
    assert generate(model, PROMPTS, 12) == model.generate(PROMPTS, 12)


def test_the_engine_equals_the_plain_way_with_guidance():
    model = tiny_model()
    plain = model.generate(PROMPTS, 12)
    model.guidance = 2.0
    guided = generate(model, PROMPTS, 12)
    assert guided == model.generate(PROMPTS, 12) != plain


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_answer_does_not_depend_on_what_is_beside_it(temperature):
    model = tiny_model()
    limits = [12, 3, 1, 20, 7]
    options = dict(temperature=temperature, stop_token=7)
    together = generate(model, PROMPTS, limits, seed=5, **options)
    for slots in 1, 2:
        assert generate(model, PROMPTS, limits, seed=5, slots=slots, **options) == together
    for i, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], limits[i], seed=[f"5 {i}"], **options)
        assert alone == [together[i]]
    if temperature:
        assert generate(model, PROMPTS, limits, seed=6, **options) != together


def test_an_answer_ends_at_its_limit_the_stop_token_or_block_size():
    model = tiny_model(block_size=32)
    [answer] = generate(model, [[1, 2, 3]], 99)
    assert len(answer) == 30  # the last id needs no place in the row
    stop = answer[4]
    events = list(stream(model, [[1, 2, 3]], 99, stop_token=stop))
    n = answer.index(stop)
    assert events == [*((0, id) for id in answer[:n]), (0, None)]
    with pytest.raises(SystemExit, match="a prompt has 33 tokens; the model takes 32"):
        generate(model, [[1] * 33], 5)


def test_an_id_without_a_token_is_never_chosen():
    model = tiny_model()
    model.banned_ids = list(range(9, 300))
    answers = generate(model, PROMPTS, 12)
    assert max(map(max, answers)) < 9


def test_weights_that_are_not_finite_are_told():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(model, PROMPTS, 2)


def test_choices_have_the_probabilities_of_the_logits():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    uniform = (torch.arange(1000) + 0.5).div(1000).tolist()

    def shares(**options):
        options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
        chosen = choose(p.log().repeat(1000, 1), uniform=uniform, **options)
        return chosen.bincount(minlength=4).div(1000).tolist()

    assert shares() == pytest.approx(p.tolist(), abs=2e-3)
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=2e-3)
    assert shares(top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=2e-3)
    squared = p.square() / p.square().sum()
    assert shares(temperature=0.5) == pytest.approx(squared.tolist(), abs=2e-3)
    assert shares(temperature=1e-9) == [1, 0, 0, 0]


def test_a_device_that_is_not_here():
    with pytest.raises(SystemExit, match="there is no device tpu here"):
        choose_device("tpu", "auto")
    with pytest.raises(SystemExit, match="dtype must be auto, float32 or bfloat16, not int8"):
        choose_device("cpu", "int8")


@pytest.mark.slow
def test_compiled_it_gives_the_same_answers():
    torch.compiler.reset()
    model = tiny_model()
    plain = generate(model, PROMPTS, 40)
    model.compile_blocks()
    assert generate(model, PROMPTS, 40) == plain


def test_loading_for_inference(run, capsys):
    from conftest import TINY

    run("train.py", *TINY, "--max_iters=2")
    model, tokenizer = load_for_inference("out", "cpu", "bfloat16", H_cycles=3)
    assert model.config.n_steps == 12 and model.lm_head.weight.dtype == torch.bfloat16
    assert "step-0000002 on cpu, torch.bfloat16" in capsys.readouterr().out
    assert generate(model, [tokenizer.prompt("2+2?", "cot")], 5) != [[]]
    with pytest.raises(SystemExit, match="there is no model in nowhere; python train.py"):
        load_for_inference("nowhere", "cpu")
