"""lm-evaluation-harness: likelihoods and generations of its adapter, against the plain model and transformers."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import plain_logits, tiny_model
from scripts import ROOT

from hf import save_hf, save_hf_tokenizer
from tokenizer import encode_prompt, make_encoding, special_id

pytest.importorskip("lm_eval")

import lm_eval.tasks  # noqa: E402

from lm_eval_hrm import HRMForHarness  # noqa: E402

ENCODING = make_encoding("bytes")
PAIRS = [("Two and two?", "four"), ("Two and two?", "4"), ("Two and two?", "5"), ("", "from nothing"), ("a", "b")]
PAIRS += [("x " * 20, " it has a space"), ("Two and two?", "four"), ("0123456789" * 4, "0123456789"), ("é", "")]
PAIRS += [("long" * 30, "cut")]


def requests(*args):
    return [SimpleNamespace(args=arg) for arg in args]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model in the Hugging Face layout."""
    path = tmp_path_factory.mktemp("hf")
    save_hf(tiny_model(n_layer=2), path)
    save_hf_tokenizer(ENCODING, path, condition="direct", block_size=64)
    return path


@pytest.fixture
def lm(directory):
    return HRMForHarness(pretrained=str(directory), condition="synth+cot", device="cpu", dtype="float32")


def prefix_of(context, room=0):
    """The prefix, without the first tokens of a text that leaves too little room."""
    ids = encode_prompt(ENCODING, context, "synth,cot")
    return ids[:3] + ids[3 + max(0, len(ids) + room - 64) :]


def plainly(model, prefix, response, n):
    ids = torch.tensor(prefix + response)
    with torch.no_grad():
        logits = plain_logits(model, ids[:-1], len(prefix))[len(ids) - 1 - n :]
    best = logits.argmax(-1).tolist() == ids[len(ids) - n :].tolist()
    return logits.log_softmax(-1).gather(1, ids[len(ids) - n :, None]).sum().item(), best


def test_likelihoods_are_those_of_the_prefix_read_in_both_directions(lm, capsys):
    found = lm.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    assert "1 of 10 contexts are too long for block_size = 64 and were cut" in capsys.readouterr().out
    for (context, continuation), (log_p, best) in zip(PAIRS, found):
        response = ENCODING.encode(continuation)
        want, right = plainly(lm.model, prefix_of(context, max(len(response) - 1, 0)), response, len(response))
        assert log_p == pytest.approx(want, rel=1e-4, abs=1e-4) and best == right
    prompt = encode_prompt(ENCODING, "Two and two?", "synth,cot")
    [new] = lm.model.generate([prompt], 3)
    greedy = bytes(id % 256 for id in new)
    if max(new) < 256 and greedy.isascii():
        assert lm.loglikelihood(requests(("Two and two?", greedy.decode())), True)[0][1]
    with pytest.raises(ValueError, match="a continuation of 62 tokens leaves no place for its prompt"):
        lm.loglikelihood(requests(("a", "b" * 62)))
    assert len(lm.loglikelihood(requests(("", "b" * 61)), True)) == 1
    assert lm.loglikelihood([]) == []


def test_likelihoods_agree_with_transformers(lm, directory):
    transformers = pytest.importorskip("transformers", minversion="5.9")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for (context, continuation), (log_p, _) in zip(PAIRS[:9], lm.loglikelihood(requests(*PAIRS[:9]), True)):
        prefix, response = prefix_of(context), ENCODING.encode(continuation)
        ids = torch.tensor([prefix + response])
        kinds = (torch.arange(ids.size(1)) < len(prefix)).long()[None]
        with torch.no_grad():
            logits = theirs(ids, token_type_ids=kinds).logits[0, len(prefix) - 1 : -1]
        want = logits.log_softmax(-1).gather(1, torch.tensor(response, dtype=torch.long)[:, None]).sum().item()
        assert log_p == pytest.approx(want, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("n", [0, 1, 60, 61, 62, 121, 122, 200])
def test_rolling_predicts_each_token_once_in_full_windows(lm, n):
    text = "".join(chr(97 + k * k % 26) for k in range(n))
    ids, prefix, done, want = ENCODING.encode(text), prefix_of(""), 0, 0.0
    while done < n:  # 61 are predicted in a row of 64 with a prefix of 4
        end = min(n, done + (60 if done else 61))
        want += plainly(lm.model, prefix, ids[max(0, end - 61) : end], end - done)[0]
        done = end
    assert lm.loglikelihood_rolling(requests((text,), ("a",)), True)[0] == pytest.approx(want, rel=1e-4, abs=1e-4)


def test_generation_ends_at_a_stop_string_and_nowhere_else(lm):
    contexts = ["How many?", "a", "and then " * 9, "x"]
    eoa = special_id(ENCODING, "eoa")
    free = lm.generate_until(requests(*((c, {"max_gen_toks": 25}) for c in contexts)), True)
    for context, text in zip(contexts, free):
        [new] = lm.model.generate([prefix_of(context, 25)], 25, stop_token=eoa)
        assert text == ENCODING.decode(new)
    stops = [next((text[k] for k in (4, 5, 6) if len(text) > 6), "?") for text in free]
    asked = [(c, {"until": [stop, "never", ""], "max_gen_toks": 25}) for c, stop in zip(contexts, stops)]
    assert lm.generate_until(requests(*asked), True) == [text.split(stop)[0] for text, stop in zip(free, stops)]
    sampled = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 9, "until": "\n\n"}
    torch.manual_seed(1)
    one = lm.generate_until(requests(*((c, sampled) for c in contexts)), True)
    torch.manual_seed(1)
    assert one == lm.generate_until(requests(*((c, sampled) for c in contexts)), True) != [t[:9] for t in free]
    greedy = {"do_sample": False, "temperature": 1.0, "max_gen_toks": 25, "until": []}
    assert lm.generate_until(requests(*((c, greedy) for c in contexts)), True) == free


def test_the_harness_runs_it(directory, tmp_path):
    """A task of one's own, from local rows; its answers are those of the likelihoods."""
    rows = [{"q": f"{i}+{i}?", "choices": [str(2 * i), str(i), "none"], "label": 0} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(f"""
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}]
""")
    lm = HRMForHarness(pretrained=str(directory), device="cpu", dtype="float32", batch_size="auto")
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    options = dict(apply_chat_template=True, bootstrap_iters=0, log_samples=True)
    result = lm_eval.simple_evaluate(lm, tasks=["sums"], task_manager=manager, **options)
    right = 0
    for row in rows:
        found = lm.loglikelihood(requests(*((row["q"], choice) for choice in row["choices"])), True)
        right += max(range(3), key=lambda i: found[i][0]) == 0
    assert result["results"]["sums"]["acc,none"] == pytest.approx(right / 12)
    assert lm.condition == "direct" and (ROOT / "lm_eval_hrm.py").exists()


def test_arguments_that_are_unknown(directory):
    with pytest.raises(ValueError, match="model_args has peft, which the model hrm does not"):
        HRMForHarness(pretrained=str(directory), device="cpu", peft="x")
