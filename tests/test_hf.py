"""The Hugging Face layout in both directions, with transformers as the independent judge."""

import json
import math
import shutil
from dataclasses import dataclass

import pytest
import torch
from conftest import close
from safetensors.torch import load_file, save_file
from scripts import TINY, run
from test_train import read_log

from common import replace_files
from generate import load_for_inference
from hf import save_hf, save_hf_tokenizer
from model import HRM, HRMConfig
from tokenizer import SPECIAL, Encoding, encode_prompt, make_encoding

transformers = pytest.importorskip("transformers", minversion="5.9")

CONFIGS = [
    dict(vocab_size=300, n_layer=4, n_head=2, n_embd=64, H_cycles=2, L_cycles=3),
    dict(vocab_size=67, n_layer=2, n_head=4, n_embd=64, H_cycles=3, L_cycles=1, prefix_lm=False),
    dict(vocab_size=129, n_layer=6, n_head=1, n_embd=32, H_cycles=1, L_cycles=2, n_ff=96),
    dict(vocab_size=263, n_layer=2, n_head=3, n_embd=48, L_cycles=2, head_dim=32, embed_scale=5.0, prefix_lm=False),
]


def random_model(shape):
    torch.manual_seed(0)
    return HRM(HRMConfig(block_size=256, **shape))


def their_logits(model, ids, n_prefix):
    prefix = (torch.arange(len(ids))[None] < n_prefix).long()
    with torch.no_grad():
        return model(ids[None], token_type_ids=prefix).logits[0]


def our_logits(model, ids, n_prefix):
    with torch.no_grad():
        return model(ids[None], prefix=torch.arange(len(ids))[None] < n_prefix)[0][0]


def their_greedy(model, prompts, n):
    """transformers' greedy generation for a batch of prompts of different lengths, padded on the left."""
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts])
    new = model.generate(
        ids, attention_mask=mask, token_type_ids=mask, max_new_tokens=n, do_sample=False, pad_token_id=0
    )
    return new[:, T:].tolist()


def split_layout(tensors):
    """The same tensors with separate projections."""
    parts = {"gqkv_proj": ("gate_proj", "q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    split = {}
    for name, t in tensors.items():
        name = name.replace(".attn.", ".self_attn.")
        fused = next((f for f in parts if f in name), None)
        for part, rows in zip(parts.get(fused, [None]), t.chunk(len(parts.get(fused, [0])))):
            split[name.replace(fused, part) if fused else name] = rows.contiguous()
    return split


@pytest.mark.parametrize("shape", CONFIGS)
def test_ours_saved_theirs_loaded(tmp_path, shape):
    ours = random_model(shape)
    save_hf(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(shape["vocab_size"], (40,))
    assert close(our_logits(ours, ids, 25), their_logits(theirs, ids, 25))
    prompts = [ids[:n].tolist() for n in (3, 17, 40, 1)]
    assert ours.generate(prompts, 64) == their_greedy(theirs, prompts, 64)


@pytest.mark.parametrize("layout", ["fused", "split", "sharded"])
@pytest.mark.parametrize("shape", CONFIGS)
def test_theirs_saved_ours_loaded(tmp_path, shape, layout):
    torch.manual_seed(1)
    c = HRMConfig(**shape)
    options = {key: getattr(c, key) for key in ("vocab_size", "head_dim", "H_cycles", "L_cycles", "prefix_lm")}
    options |= dict(hidden_size=c.n_embd, intermediate_size=c.n_ff, num_attention_heads=c.n_head)
    options |= dict(num_hidden_layers=c.n_layer // 2, max_position_embeddings=256, initializer_range=0.1)
    options |= dict(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    theirs = transformers.HrmTextForCausalLM(transformers.HrmTextConfig(**options)).eval()
    theirs.model.z_L_init.data.normal_()
    theirs.save_pretrained(tmp_path, max_shard_size="50KB" if layout == "sharded" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (layout == "sharded")
    if layout == "split":
        save_file(split_layout(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors")
    ours = HRM.from_pretrained(tmp_path)
    assert ours.config.rope_theta == 5000.0 and ours.config.embed_scale == pytest.approx(10.0)
    ids = torch.randint(c.vocab_size, (40,))
    assert close(our_logits(ours, ids, 25), their_logits(theirs, ids, 25))
    prompts = [ids[:n].tolist() for n in (3, 17, 40, 1)]
    assert ours.generate(prompts, 64) == their_greedy(theirs, prompts, 64)


def test_the_published_form_of_the_config(tmp_path):
    """num_hidden_layers counts the blocks of a stack, rope_theta stands alone, and the scale follows from the range."""
    ours = random_model(CONFIGS[0])
    save_hf(ours, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config["num_hidden_layers"] == 2 and config["rope_theta"] == 10000.0 and "num_layers_per_stack" not in config
    del config["embedding_scale"]
    path.write_text(json.dumps({**config, "rope_parameters": {"rope_theta": 500.0}, "H_cycles": None}))
    again = HRM.from_pretrained(tmp_path).config
    assert again.embed_scale == pytest.approx(8.0) and again.rope_theta == 500.0 and again.H_cycles == 2


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"num_key_value_heads": 1}, "num_key_value_heads = 1 is not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_scaling"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"vocab_size": "300"}, "vocab_size = '300' is no number"),
        ({"H_cycles": 2.0}, "H_cycles = 2.0 is no number"),
        ({"rope_theta": 0}, "rope_theta = 0 is no number"),
        ({"prefix_lm": "false"}, "prefix_lm = 'false' is no true or false"),
        ({"rope_parameters": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": 3}, "rope_scaling"),
        ({"rope_theta": 10**400}, "config.json is of a model that cannot be: rope_theta of a model must be"),
        ({"embedding_scale": math.inf}, "config.json is of a model that cannot be: embed_scale of a model must be"),
        ({"initializer_range": 5e-324, "embedding_scale": None}, "embed_scale of a model must be"),
        ({"head_dim": 31}, "head_dim .31. must be even"),
        ({"H_cycles": 10**9}, "blocks follow each other"),
        ({"vocab_size": 10**12}, "vocab_size of a model must be"),
        ({"vocab_size": 301}, "embed_tokens.weight has shape"),
        ({"num_hidden_layers": 3}, "lacks the tensor model.H_module.layers.2"),
        ({"num_hidden_layers": 1}, "not of this model: model.H_module.layers.1"),
    ],
)
def test_what_is_not_this_model_is_named(tmp_path, change, sentence):
    save_hf(random_model(CONFIGS[0]), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in {**json.loads(path.read_text()), **change}.items() if v is not None}))
    with pytest.raises(ValueError, match=sentence):
        HRM.from_pretrained(tmp_path)


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(OSError, match="neither ckpt.pt nor config.json"):
        HRM.from_pretrained(tmp_path)
    save_hf(random_model(CONFIGS[0]), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        HRM.from_pretrained(tmp_path)
    weights.unlink()
    index = tmp_path / "model.safetensors.index.json"
    for content in "[]", "{", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}':
        index.write_text(content)
        with pytest.raises(ValueError, match="index.json is damaged"):
            HRM.from_pretrained(tmp_path)
    for file in "../x.safetensors", "..", "", "/x.safetensors":
        index.write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(ValueError, match="outside its directory"):
            HRM.from_pretrained(tmp_path)
    index.write_text('{"weight_map": {"a": "x.safetensors"}}')
    with pytest.raises(OSError, match="there is no .*x.safetensors"):
        HRM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be downloaded from the hub"):
        HRM.from_pretrained("nobody/nothing")


@pytest.mark.parametrize("spoil", [lambda t: t * math.nan, lambda t: t / torch.eye(64, 256), torch.Tensor.int])
def test_weights_that_are_no_numbers_are_named(tmp_path, spoil):
    save_hf(random_model(CONFIGS[0]), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.H_module.layers.1.mlp.down_proj.weight"
    tensors[name] = spoil(tensors[name])
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name}, of .* holds integers, NaN or infinity"):
        HRM.from_pretrained(tmp_path)


def test_a_tensor_in_two_files_is_named(tmp_path):
    save_hf(random_model(CONFIGS[0]), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="b.safetensors holds lm_head.weight, as another file"):
        HRM.from_pretrained(tmp_path)


def test_what_the_layout_cannot_hold_is_refused(tmp_path):
    @dataclass
    class Config(HRMConfig):
        dropout: float = 0.0

    for dropout in 0.0, 0.1:
        model = HRM(Config(vocab_size=67, n_layer=2, n_head=2, n_embd=32, dropout=dropout))
        if dropout:
            with pytest.raises(ValueError, match="a model with dropout = 0.1 is no HRM of transformers"):
                save_hf(model, tmp_path)
        else:
            save_hf(model, tmp_path)
    model = HRM(HRMConfig(vocab_size=67, n_layer=2, n_head=2, n_embd=32))
    model.H[0].q_norm = torch.nn.Parameter(torch.ones(16))
    with pytest.raises(ValueError, match="a model with H.0.q_norm is no HRM of transformers"):
        save_hf(model, tmp_path)


def test_an_export_replaces_all_files_or_none(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("old")
    with pytest.raises(OSError), replace_files(tmp_path) as parts:
        (parts / "a").write_text("new")
        raise OSError("no space left")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "b": "old"}
    with replace_files(tmp_path) as parts:
        (parts / "a").write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "old"}


def test_a_vocabulary_larger_than_its_tokenizer(tmp_path):
    """Padded embeddings never come out as ids; a tokenizer with more ids than the model has is refused."""
    encoding = make_encoding("bytes")
    for vocab_size in 300, 260:
        save_hf(random_model({**CONFIGS[0], "vocab_size": vocab_size}), tmp_path / str(vocab_size))
        save_hf_tokenizer(encoding, tmp_path / str(vocab_size))
    model, *_ = load_for_inference(tmp_path / "300", device="cpu", dtype="float32")
    assert max(max(ids) for ids in model.generate([[1, 2, 3]] * 50, 20, temperature=9.0, seed=0)) < 263
    with pytest.raises(ValueError, match="the tokenizer has 263 ids and the model 260"):
        load_for_inference(tmp_path / "260", device="cpu")


def test_ids_without_a_token_are_never_chosen(tmp_path):
    """Holes among the ids: not by sampling, and not where they have the highest logits."""
    bytes_ = {bytes([i]): i for i in range(256)}
    holes = [*range(256, 270), 271, *range(277, 300)]
    encoding = Encoding("holes", bytes_, r"[\s\S]", dict(zip(SPECIAL.values(), (270, *range(272, 277), 276 + 24))))
    save_hf(random_model({**CONFIGS[0], "vocab_size": 320}), tmp_path)
    save_hf_tokenizer(encoding, tmp_path)
    model, encoding, _ = load_for_inference(tmp_path, device="cpu", dtype="float32")
    assert encoding.n_vocab == 301
    with torch.no_grad():
        model.lm_head[holes] *= 10
    for options in {}, dict(temperature=3.0, seed=0), dict(temperature=3.0, top_k=40, top_p=0.9, seed=0):
        for ids in model.generate([[1, 2, 3], [4, 5]] * 20, 20, **options):
            encoding.decode(ids)  # raises if one has no token


def test_the_chat_template_makes_our_prefix(tmp_path):
    encoding = make_encoding("bytes")
    save_hf_tokenizer(encoding, tmp_path, condition="cot")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    message = [{"role": "user", "content": "What is 2+2? é"}]
    for condition, kwargs in (("cot", {}), ("synth,cot", {"condition": "synth,cot"}), ("", {"condition": ""})):
        encoded = tokenizer.apply_chat_template(message, return_dict=True, add_generation_prompt=True, **kwargs)
        assert encoded["input_ids"] == encode_prompt(encoding, "What is 2+2? é", condition)
        assert set(encoded["token_type_ids"]) == {1}


# ----------------------------------------------------------------------------------------------------
# a trained model, out and in again


def test_export_answers_the_same(workplace):
    """train.py -> hf.py -> transformers alone; and sample.py and eval.py on the export as on the run."""
    run(workplace, "train.py", *TINY, "--max_iters=30", "--learning_rate=1e-2", "--ema=0.5")
    assert "hf: config.json, generation_config.json, model.safe" in run(workplace, "hf.py", "--export_dir=hf").stdout
    question = "Tom has 12 apples and buys 9 more. How many apples does Tom have now?"
    asked = [f"--prompt={question}", "--max_new_tokens=20", "--dtype=float32"]
    said = [run(workplace, "sample.py", *asked, *init).stdout for init in ([], ["--init_from=hf"])]
    answers = [text.partition(f"{question}\n---\n")[2] for text in said]
    assert answers[0] == answers[1] and len(answers[0]) > 5
    results, args = [], ["--tasks=problems", "--limit=5", "--max_new_tokens=10", "--save_generations=True"]
    for out, init in ("out", []), ("out2", ["--init_from=hf"]):
        run(workplace, "eval.py", f"--out_dir={out}", *init, *args)
        results.append((workplace / out / "generations-problems.jsonl").read_text())
    assert results[0] == results[1] and len(results[0]) > 100
    pipe = transformers.pipeline("text-generation", model=str(workplace / "hf"), dtype=torch.float32)
    reply = pipe([{"role": "user", "content": question}], max_new_tokens=20)[0]["generated_text"][-1]["content"]
    assert reply == answers[0].rstrip("\n")
    tuned = ["--init_from=hf", "--out_dir=tuned", "--max_iters=1", "--bp_min=5", "--learning_rate=0.0"]
    run(workplace, "train.py", *TINY, *tuned)
    before, after = (read_log(workplace / out, "val_loss") for out in ("out", "tuned"))
    assert after[1] == pytest.approx(before[30], rel=1e-5)
