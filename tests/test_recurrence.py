"""The recurrences, norms, masks and objectives that HRM is compared with: each against its plain loop (conftest.py)."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import close, documents, pack, plain_logits, tiny_model
from scripts import TINY, run
from test_train import read_log
from torch.utils.flop_counter import FlopCounterMode

from data import prepare
from generate import load_for_inference
from hf import load_hf, save_hf
from loader import Loader, read_index
from model import IGNORE, NORMS, RECURRENCES, HRMConfig

each = pytest.mark.parametrize("recurrence, norm", [(r, n) for r in RECURRENCES for n in NORMS])


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@each
@pytest.mark.parametrize("prefix_lm", [True, False])
def test_packed_logits_equal_a_plain_loop(recurrence, norm, prefix_lm):
    model, docs = tiny_model(recurrence=recurrence, norm=norm, prefix_lm=prefix_lm), documents()
    idx, _, doc, prefix = pack(docs, 64)
    logits, _ = model(idx, doc=doc, prefix=prefix)
    for number, (ids, p) in enumerate(docs):
        packed = logits[0, doc[0] == number]
        assert close(packed, plain_logits(model, ids[:-1], p))
        assert close(packed, model(ids[None, :-1], prefix=torch.arange(len(ids) - 1)[None] < p)[0][0])


@each
def test_gradients_equal_a_plain_loop_with_detach(recurrence, norm):
    """At every bp_steps, for an odd number of steps too."""
    for L_cycles in (3, 2):
        model, docs = tiny_model(recurrence=recurrence, norm=norm, H_cycles=2 if L_cycles == 3 else 1), documents()
        n_targets = sum(len(ids) - p for ids, p in docs)
        for K in range(2, model.config.n_steps + 1):
            model(*pack(docs, 64), bp_steps=K)[1].backward()
            packed = gradients(model)
            for ids, p in docs:
                logits = plain_logits(model, ids[:-1], p, K)
                (F.cross_entropy(logits[p - 1 :], ids[p:], reduction="sum") / n_targets).backward()
            plain = gradients(model)
            assert packed.keys() == plain.keys()
            for name, g in plain.items():
                assert close(packed[name], g), (K, name)
    model(*pack(docs, 64))[1].backward()  # None: all steps, as the last K
    for name, g in gradients(model).items():
        assert torch.equal(g, packed[name])


@each
def test_cached_generation_equals_full_forward_passes(recurrence, norm):
    for prefix_lm in True, False:
        model = tiny_model(recurrence=recurrence, norm=norm, prefix_lm=prefix_lm)
        prompts = [ids.tolist() for ids, _ in documents(((5, 0), (1, 0), (23, 0)))]
        for prompt, new in zip(prompts, model.generate(prompts, 8, slots=2)):
            assert len(new) == 8
            for k, id in enumerate(new):
                assert plain_logits(model, torch.tensor(prompt + new[:k]), len(prompt))[-1].argmax() == id


def test_compiled_blocks_give_the_same():
    model, row = tiny_model(recurrence="trm", norm="post"), pack(documents(), 64)
    model(*row, bp_steps=4)[1].backward()
    want = gradients(model)
    model.set_compute(compile=True)
    model(*row, bp_steps=4)[1].backward()
    for name, g in gradients(model).items():
        assert close(g, want[name]), name


@each
def test_flops_are_those_that_torch_counts(recurrence, norm):
    """Products with weights, of a row of targets alone. What attention multiplies is not counted, in either."""
    for cycles in dict(H_cycles=2, L_cycles=3), dict(H_cycles=1, L_cycles=2):
        model = tiny_model(recurrence=recurrence, norm=norm, **cycles)
        idx = torch.arange(64)[None]
        for K in range(2, model.config.n_steps + 1):
            with FlopCounterMode(display=False) as counter:
                model(idx, idx, bp_steps=K)[1].backward()
            counted = counter.get_flop_counts()["Global"]
            assert {str(op) for op in counted} >= {"aten.mm"}
            assert counted[torch.ops.aten.mm] == 64 * model.flops_per_token(K)


def test_recurrences_of_one_shape_cost_the_same():
    models = {name: tiny_model(recurrence=name) for name in RECURRENCES}
    n_weights = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    stack = sum(p.numel() for p in models["hrm"].H.parameters())
    flops = {name: model.flops_per_token(5) for name, model in models.items() if name != "transformer"}
    assert flops == dict.fromkeys(flops, models["hrm"].flops_per_token(5)) and len(flops) == 4
    fewer = {name: n_weights["hrm"] - n for name, n in n_weights.items()}
    assert fewer == dict.fromkeys(RECURRENCES, 0) | {"trm": stack}
    assert [HRMConfig(recurrence=name, L_cycles=2, H_cycles=1).n_steps for name in RECURRENCES] == [3, 3, 4, 3, 2]


def test_of_a_transformer_magic_norm_is_plain_pre_norm():
    idx, _, doc, prefix = pack(documents(), 64)
    models = [tiny_model(recurrence="transformer", norm=norm) for norm in ("magic", "pre")]
    assert torch.equal(*(model(idx, doc=doc, prefix=prefix)[0] for model in models))


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_a_causal_mask_shows_no_later_token_of_the_instruction(recurrence):
    model, (ids, p) = tiny_model(recurrence=recurrence, prefix_lm=False), documents([(10, 10)])[0]
    prefix = torch.arange(20)[None] < p
    before, _ = model(ids[None], prefix=prefix)
    for changed in 15, 9, 4:
        other = ids.clone()
        other[changed] = (other[changed] + 1) % 263
        moved = (model(other[None], prefix=prefix)[0] - before).abs().amax(-1)[0] > 1e-6
        assert moved.nonzero()[0].item() == changed


def test_bad_names_are_refused():
    for key in "recurrence", "norm":
        with pytest.raises(ValueError, match=f"{key} must be .*, not '?sideways'?"):
            HRMConfig(**{key: "sideways"})
    with pytest.raises(ValueError, match="bp_steps must be from 2 to 2, the steps of this recurrence, not 3"):
        tiny_model(recurrence="transformer")(torch.zeros(1, 4, dtype=torch.long), bp_steps=3)


# ----------------------------------------------------------------------------------------------------
# the loss


def test_loss_on_all_tokens_has_every_token_but_the_first_as_target(tmp_path):
    prepare(tmp_path / "d", n_problems=60, n_val_problems=5)
    loaders = [Loader(tmp_path / "d", "train", 2, 256, seed=3) for _ in range(2)]
    loaders[1].loss_on = "all"
    tokens, index = np.fromfile(tmp_path / "d" / "train.bin", np.uint16), read_index(tmp_path / "d", "train")
    for _ in range(5):
        response, whole = map(next, loaders)
        assert torch.equal(response.idx, whole.idx) and torch.equal(response.prefix, whole.prefix)
        for batch in response, whole:
            assert batch.n_targets == int((batch.targets != IGNORE).sum())
        is_target = response.targets != IGNORE
        assert torch.equal(response.targets[is_target], whole.targets[is_target])
        want = [tokens[index[d - 1, 0] * (d > 0) : index[d, 0]][1:] for d in whole.documents]
        assert whole.targets[whole.targets != IGNORE].tolist() == np.concatenate(want).tolist()
        assert ((whole.targets != IGNORE) == (whole.doc >= 0)).all() and whole.n_targets == whole.n_tokens


# ----------------------------------------------------------------------------------------------------
# runs and files


def weights(out):
    return torch.load(out / "ckpt.pt", weights_only=True)["model"]


def test_a_run_resumes_and_answers(workplace):
    args = [*TINY, "--recurrence=looped", "--norm=post", "--prefix_lm=False", "--loss_on=all"]
    args += ["--bp_warmup=0.5", "--eval_iters=2", "--checkpoint_interval=4", "--log_interval=1"]
    run(workplace, "train.py", *args, "--max_iters=8", "--out_dir=straight")
    out = workplace / "out"
    shutil.copytree(workplace / "straight", out)
    (out / "ckpt-00000004.pt").replace(out / "ckpt.pt")
    assert "resuming out at step 4" in run(workplace, "train.py", "--init_from=resume", "--out_dir=out").stdout
    assert all(torch.equal(w, weights(workplace / "straight")[name]) for name, w in weights(out).items())
    assert read_log(out, "val_loss") == read_log(workplace / "straight", "val_loss")
    assert "1 + 1" in run(workplace, "sample.py", "--prompt=1 + 1", "--max_new_tokens=8").stdout
    model, _, _ = load_for_inference(out, device="cpu", dtype="float32")
    assert (model.config.recurrence, model.config.norm, model.config.prefix_lm) == ("looped", "post", False)
    said = run(workplace, "train.py", "--init_from=resume", "--recurrence=rins", ok=False).stderr
    assert "holds another model" in said and "recurrence looped" in said
    with pytest.raises(ValueError, match="guidance and kl_threshold compare H-steps"):
        load_for_inference(out, device="cpu", dtype="float32", guidance=0.5)
    run(workplace, "train.py", *TINY, "--recurrence=transformer", "--max_iters=1", "--out_dir=plain")
    with pytest.raises(ValueError, match="is a plain Transformer, which has neither H_cycles nor L_cycles"):
        load_for_inference(workplace / "plain", device="cpu", dtype="float32", H_cycles=3)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ("--loss_on=all", "loss_on must be response, or all (which needs prefix_lm=False), not all"),
        (
            "--loss_on=some --prefix_lm=False",
            "loss_on must be response, or all",
        ),
        ("--recurrence=spiral", "recurrence must be hrm, trm, looped, rins, transformer, not"),
        ("--norm=0", "norm must be"),
        ("--recurrence=transformer --bp_max=5", "bp_min (2) and bp_max (5) must rise from 2 to at most 2"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(workplace, wrong, sentence):
    said = run(workplace, "train.py", *TINY, *wrong.split(), ok=False).stderr
    assert sentence in said and "Traceback" not in said and not (workplace / "out").exists()


def test_files_from_before_these_settings_still_load(workplace):
    run(workplace, "train.py", *TINY, "--max_iters=4")
    out, new = workplace / "out", ("recurrence", "norm", "loss_on")
    ckpt, log = torch.load(out / "ckpt.pt", weights_only=True), json.loads((out / "run.json").read_text())
    for place in ckpt["config"], ckpt["settings"], log["settings"]:
        for name in new:
            place.pop(name, None)
    torch.save(ckpt, out / "ckpt.pt")
    (out / "run.json").write_text(json.dumps(log))
    assert load_for_inference(out, device="cpu", dtype="float32")[0].config.recurrence == "hrm"
    run(workplace, "train.py", "--init_from=resume", "--out_dir=out", "--max_iters=6")
    assert torch.load(out / "ckpt.pt", weights_only=True)["iter"] == 6


def test_the_layout_holds_trm_as_an_hrm_and_refuses_what_it_cannot_hold(tmp_path):
    model, ids = tiny_model(recurrence="trm"), documents()[0][0][None]
    save_hf(model, tmp_path / "trm")
    again = load_hf(tmp_path / "trm")
    assert again.config.recurrence == "hrm" and torch.equal(again(ids)[0], model(ids)[0])
    for change, said in (
        (dict(recurrence="looped"), "recurrence = 'looped'"),
        (dict(recurrence="rins"), "recurrence = 'rins'"),
        (dict(recurrence="transformer"), "recurrence = 'transformer'"),
        (dict(recurrence="trm", norm="pre"), "norm = 'pre'"),
        (dict(norm="post"), "norm = 'post'"),
    ):
        with pytest.raises(ValueError, match=f"a model with {said} is no HRM of transformers"):
            save_hf(tiny_model(**change), tmp_path / "other")
