"""A checkpoint is a directory in the Hugging Face layout, whole or not there."""

import json

import pytest
import torch
from conftest import documents, pack, tiny_model
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import load_checkpoint, load_model, save_checkpoint, save_model
from model import RECURRENCES
from optim import AdamATan2, MovingAverage
from tokenizer import get_tokenizer

ROW = pack(documents((5, 4), (9, 2)), 32)


def trained(optimizer_class=AdamATan2, steps=2):
    model = tiny_model()
    optimizer = optimizer_class(model.parameters(), lr=1e-2)
    average = MovingAverage(model)
    train(model, optimizer, average, steps)
    return model, optimizer, average


def train(model, optimizer, average, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(*ROW, bp_steps=2)[1].backward()
        optimizer.step()
        average.update(0.5)


def save(out, step, run, **options):
    save_checkpoint(out, {"iter": step}, *run, get_tokenizer("bytes"), **options)
    return out / f"step-{step:07d}"


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_a_saved_model_is_the_same(tmp_path, recurrence):
    model = tiny_model(recurrence=recurrence, norm="post", prefix_lm=False)
    save_model(tmp_path, model)
    again = load_model(str(tmp_path))
    assert again.config == model.config
    for a, b in zip(model.state_dict().values(), again.state_dict().values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer_class", [AdamATan2, torch.optim.AdamW, torch.optim.SGD])
def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path, optimizer_class):
    """With any optimizer; two bp_steps leave the embedding without moments."""
    run = trained(optimizer_class)
    place = save(tmp_path, 2, run)
    train(*run, steps=2)
    other = trained(optimizer_class, steps=0)
    load_checkpoint(place, *other)
    train(*other, steps=2)
    for a, b in zip(run[0].parameters(), other[0].parameters()):
        assert torch.equal(a, b)
    for a, b in zip(run[2].tensors.values(), other[2].tensors.values()):
        assert torch.equal(a, b)


def test_the_averaged_weights_are_the_model(tmp_path):
    model, optimizer, average = trained()
    place = save(tmp_path, 2, (model, optimizer, average))
    again = load_model(str(tmp_path))
    assert torch.equal(again.lm_head.weight, average.tensors["lm_head.weight"])
    assert not torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert not any(name.startswith("ema") for name in load_file(place / "train.safetensors"))


def test_the_newest_are_kept_and_one_that_cannot_be_read_is_passed_over(tmp_path, capsys):
    run = trained()
    for step in 1, 2, 3:
        save(tmp_path, step, run)
    names = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert names == ["step-0000002", "step-0000003"]
    damaged = tmp_path / names[1] / "train.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert checkpoint.latest_checkpoint(tmp_path).name == names[0]
    assert "step-0000003 cannot be read" in capsys.readouterr().out
    save(tmp_path, 3, run)  # takes its place
    assert checkpoint.latest_checkpoint(tmp_path).name == names[1]
    for path in checkpoint.checkpoints(tmp_path):
        (path / "train.json").unlink()
    with pytest.raises(SystemExit, match="no checkpoint in .* can be read"):
        load_model(str(tmp_path))


def test_a_checkpoint_that_fails_leaves_those_before(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError("No space left")

    run = trained()
    save(tmp_path, 1, run)
    monkeypatch.setattr(checkpoint, "save_file", full)
    save(tmp_path, 2, run)
    assert "step-0000002 cannot be written: No space left" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]


def test_weights_in_parts_and_in_several_files_are_read(tmp_path):
    """As transformers may write them, with its own count of layers."""
    model = tiny_model()
    save_model(tmp_path, model)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    parts = {}
    for name, tensor in tensors.items():
        names = [name]
        for fused, several in checkpoint.SPLIT.items():
            if fused in name:
                names = [name.replace(fused, part) for part in several]
        for part, values in zip(names, tensor.chunk(len(names))):
            parts[part] = values.contiguous()
    half = sorted(parts)[::2]
    save_file({name: parts[name] for name in half}, tmp_path / "model-00001-of-00002.safetensors")
    rest = {name: parts[name] for name in parts if name not in half}
    save_file(rest, tmp_path / "model-00002-of-00002.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_layers_per_stack"] = config["num_hidden_layers"]
    config["num_hidden_layers"] *= model.config.n_steps
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = load_model(str(tmp_path))
    assert again.config == model.config
    assert torch.equal(again.state_dict()["H_module.layers.0.attn.gqkv_proj.weight"],
                       model.state_dict()["H_module.layers.0.attn.gqkv_proj.weight"])


def test_transformers_computes_the_same_from_a_checkpoint_as_it_is(tmp_path):
    from transformers import AutoModelForCausalLM

    run = trained()
    place = save(tmp_path, 2, run)
    ours = load_model(str(place))
    theirs = AutoModelForCausalLM.from_pretrained(place)
    ids, n_prefix = documents((9, 6))[0]
    prefix = (torch.arange(len(ids)) < n_prefix)[None]
    expected = ours(ids[None], prefix=prefix)[0]
    logits = theirs(input_ids=ids[None], token_type_ids=prefix.long()).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    unused = theirs.generation_config.suppress_tokens
    assert unused == list(range(263, 300))  # the ids that have no token


def test_transformers_refuses_what_it_does_not_compute(tmp_path):
    from transformers import AutoConfig

    with_own_weight = tiny_model()
    with_own_weight.scale = torch.nn.Parameter(torch.ones(4))
    variants = [tiny_model(recurrence="trm"), tiny_model(norm="pre"), with_own_weight]
    for model in variants:
        save_model(tmp_path, model)
        with pytest.raises(ValueError, match="hrm_text_variant"):
            AutoConfig.from_pretrained(tmp_path)


def test_what_is_no_model_is_told(tmp_path):
    with pytest.raises(SystemExit, match="there is no model in .*; python train.py --out_dir="):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(SystemExit, match="this is no HRM but gpt2"):
        load_model(str(tmp_path))
