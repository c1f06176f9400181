"""The Hugging Face layout in both directions, with transformers and tokenizers as the independent judges."""

import json

import pytest
import torch
from scripts import run
from test_data import TEXTS

import data
from model import HRM, HRMConfig

transformers = pytest.importorskip("transformers", minversion="5.9")
tokenizers = pytest.importorskip("tokenizers")

CONFIGS = [
    dict(vocab_size=300, n_layer=4, n_head=2, n_embd=64, H_cycles=2, L_cycles=3),
    dict(vocab_size=67, n_layer=2, n_head=4, n_embd=64, H_cycles=3, L_cycles=1, prefix_lm=False),
    dict(vocab_size=129, n_layer=6, n_head=1, n_embd=32, H_cycles=1, L_cycles=2, n_ff=96),
    dict(
        vocab_size=263,
        n_layer=2,
        n_head=3,
        n_embd=48,
        H_cycles=2,
        L_cycles=2,
        head_dim=32,
        embed_scale=5.0,
        prefix_lm=False,
    ),
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


def close(a, b):
    return ((a - b).abs().max() / b.abs().max()).item() < 1e-5


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
    ours.save_pretrained(tmp_path)
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
    theirs = transformers.HrmTextForCausalLM(
        transformers.HrmTextConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.n_embd,
            intermediate_size=c.n_ff,
            num_hidden_layers=c.n_layer // 2,
            num_attention_heads=c.n_head,
            head_dim=c.head_dim,
            H_cycles=c.H_cycles,
            L_cycles=c.L_cycles,
            prefix_lm=c.prefix_lm,
            max_position_embeddings=256,
            initializer_range=0.1,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        )
    ).eval()
    theirs.model.z_L_init.data.normal_()
    theirs.save_pretrained(tmp_path, max_shard_size="50KB" if layout == "sharded" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (layout == "sharded")
    if layout == "split":
        from safetensors.torch import load_file, save_file

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
    ours.save_pretrained(tmp_path)
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
        ({"vocab_size": 301}, "embed_tokens.weight has shape"),
        ({"num_hidden_layers": 3}, "lacks the tensor model.H_module.layers.2"),
        ({"num_hidden_layers": 1}, "not of this model: model.H_module.layers.1"),
    ],
)
def test_what_is_not_this_model_is_named(tmp_path, change, sentence):
    random_model(CONFIGS[0]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in {**json.loads(path.read_text()), **change}.items() if v is not None}))
    with pytest.raises(ValueError, match=sentence):
        HRM.from_pretrained(tmp_path)


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(OSError, match="neither ckpt.pt nor config.json"):
        HRM.from_pretrained(tmp_path)
    random_model(CONFIGS[0]).save_pretrained(tmp_path)
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
    with pytest.raises(ValueError, match="cannot be had from the hub"):
        HRM.from_pretrained("nobody/nothing")


# ----------------------------------------------------------------------------------------------------
# tokenizers

CORPUS = [f"{row['instruction']} {row['response']}" for row in data.word_problems("train", 500, 0)] + [
    "def f(x):\n    return x ** 2  # naïve café\n" * 3,
    "数学は楽しい。1234567 + 89 = ?\t\r\n\n   indented",
]
HARD = [
    *TEXTS,
    *CORPUS[::50],
    "".join(map(chr, range(0x3000))),
    "🙂👩‍👩‍👧 é é ﷽ 𝔘𝔫𝔦",
    " \n \t  \r\n\u00a0\u3000 x",
    "It's 'LL we'd I'm 12,345.67 ½ ²",
    "<|im_start|><|object_ref_end|>2+2?<|im_end|>4<|box_end|><|nothing|>",
]


def same_ids(encoding, tokenizer):
    """On every hard text, with special tokens read as such and not."""
    for text in HARD:
        assert encoding.encode(text, allowed_special="all") == tokenizer.encode(text, add_special_tokens=False).ids, (
            text
        )
    tokenizer.encode_special_tokens = True
    for text in HARD:
        assert encoding.encode_ordinary(text) == tokenizer.encode(text, add_special_tokens=False).ids, text
        assert tokenizer.decode(encoding.encode_ordinary(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("spec", ["bytes", "train:1000"])
def test_our_tokenizers_in_their_format(tmp_path, spec):
    if spec.startswith("train"):
        pytest.importorskip("rustbpe")
    encoding = data.make_encoding(spec, texts=CORPUS)
    data.save_hf_tokenizer(encoding, tmp_path)
    same_ids(encoding, tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
    assert data.same_tokenizer(data.load_encoding(tmp_path), encoding)  # and back


@pytest.mark.parametrize("split", ["gpt2", "ours", "special tokens first"])
def test_their_tokenizers_in_our_format(tmp_path, split):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split != "ours")
    tokenizer.pre_tokenizer = byte_level
    if split == "ours":
        by_regex = tokenizers.pre_tokenizers.Split(tokenizers.Regex(data.SPLIT), "isolated")
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([by_regex, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = list(data.SPECIAL.values()) if split == "special tokens first" else []
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, tokenizers.trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, special_tokens=special)
    )
    tokenizer.add_special_tokens(list(data.SPECIAL.values()))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoding = data.load_encoding(tmp_path)
    assert encoding.n_vocab == tokenizer.get_vocab_size()
    same_ids(encoding, tokenizer)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"normalizer": {"type": "NFC"}}, r"a normalizer \(NFC\)"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "must be split by"),
        ({"model": {"type": "Unigram", "vocab": {}, "merges": []}}, "only byte-level BPE"),
        ({"model": 3}, "no tokenizer of byte-level BPE"),
        ({"model": {"type": "BPE", "vocab": None, "merges": []}}, "no tokenizer of byte-level BPE"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}, "must be split by"),
        ({"added_tokens": [{"id": 256, "content": "<x>", "lstrip": True}]}, "lstrip"),
        ({"added_tokens": [{"id": 7, "content": "<x>"}]}, "same id"),
        ({"added_tokens": [{"content": "<x>"}]}, "no tokenizer of byte-level BPE"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path, change, sentence):
    file = data.encoding_to_hf(data.make_encoding("bytes"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**file, **change}))
    with pytest.raises(ValueError, match=sentence):
        data.load_encoding(tmp_path)


def hand_made(merges, extra=()):
    """A tokenizer.json of the bytes, then the tokens that merges make, then extra ones without a merge."""
    file = data.encoding_to_hf(data.make_encoding("bytes"))
    file["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    for i, token in enumerate([a + b for a, b in merges] + list(extra)):
        file["model"]["vocab"][token] = 300 + i
    file["model"].update(merges=[list(pair) for pair in merges], ignore_merges=False)
    return file


@pytest.mark.parametrize(
    "merges, extra",
    [([("b", "c"), ("a", "b"), ("ab", "c")], ()), ([], ["hello"]), ([("a", "b")], ["abab"])],
)
def test_merges_that_tiktoken_would_make_otherwise_are_refused(tmp_path, merges, extra):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(hand_made(merges, extra)))
    with pytest.raises(ValueError, match="do not make the token"):
        data.load_encoding(tmp_path)
    path.write_text(json.dumps(hand_made([("a", "b"), ("ab", "c"), ("abc", "ab")])))
    tokenizer, encoding = tokenizers.Tokenizer.from_file(str(path)), data.load_encoding(tmp_path)
    for text in "abc", "abcab", "aabcabcab", "bcabab":
        assert encoding.encode_ordinary(text) == tokenizer.encode(text).ids


def test_possessive_repetitions_survive_the_export(tmp_path):
    """As in cl100k_base, whose \\p{N}{1,3}+ other regex engines read as a repetition of groups."""
    ranks = {**{bytes([i]): i for i in range(256)}, b"12": 256, b"34": 257, b"123": 258, b"1234": 259, b"456": 260}
    encoding = data.build_encoding("numbers", ranks, r"\p{N}{1,3}+| ?\p{L}++|[^\p{N}\p{L}]")
    data.save_hf_tokenizer(encoding, tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in "1234", "12345678", "½²34 abc 1", "99999":
        assert encoding.encode_ordinary(text) == tokenizer.encode(text).ids
    assert data.portable(encoding._pat_str) == r"(?>\p{N}{1,3})| ?\p{L}++|[^\p{N}\p{L}]"


def test_a_vocabulary_larger_than_its_tokenizer(tmp_path):
    """Padded embeddings never come out as ids; a tokenizer with more ids than the model has is refused."""
    encoding = data.make_encoding("bytes")
    for vocab_size in 300, 260:
        random_model({**CONFIGS[0], "vocab_size": vocab_size}).save_pretrained(tmp_path / str(vocab_size))
        data.save_hf_tokenizer(encoding, tmp_path / str(vocab_size))
    model, _ = data.load_for_inference(tmp_path / "300", True, "cpu", torch.float32)
    assert max(model.generate([[1, 2, 3]] * 50, 20, temperature=9.0, seed=0), key=max) and model.usable_ids == 263
    assert max(max(ids) for ids in model.generate([[1, 2, 3]] * 50, 20, temperature=9.0, seed=0)) < 263
    with pytest.raises(ValueError, match="the tokenizer has 263 ids and the model 260"):
        data.load_for_inference(tmp_path / "260", True, "cpu", torch.float32)


def test_the_chat_template_makes_our_prefix(tmp_path):
    encoding = data.make_encoding("bytes")
    data.save_hf_tokenizer(encoding, tmp_path, condition="cot")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    message = [{"role": "user", "content": "What is 2+2? é"}]
    for condition, kwargs in (("cot", {}), ("synth,cot", {"condition": "synth,cot"}), ("", {"condition": ""})):
        encoded = tokenizer.apply_chat_template(message, return_dict=True, add_generation_prompt=True, **kwargs)
        assert encoded["input_ids"] == data.encode_prompt(encoding, "What is 2+2? é", condition)
        assert set(encoded["token_type_ids"]) == {1}


# ----------------------------------------------------------------------------------------------------
# a trained model, out and in again


def test_export_answers_the_same(tmp_path, problems_dir):
    """train.py -> model.py -> transformers alone; and sample.py and eval.py on the export as on the run."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "problems").symlink_to(problems_dir)
    shape = ["--n_layer=2", "--n_embd=32", "--block_size=256", "--batch_size=2", "--device=cpu", "--compile=False"]
    run(tmp_path, "train.py", *shape, "--max_iters=30", "--learning_rate=1e-2", "--ema=0.5")
    run(tmp_path, "model.py", "--export_dir=hf")
    question = "Tom has 12 apples and buys 9 more. How many apples does Tom have now?"
    answers = []
    for init in [], ["--init_from=hf"]:
        said = run(tmp_path, "sample.py", f"--prompt={question}", "--max_new_tokens=20", *init).stdout
        answers.append(said.partition(f"{question}\n---\n")[2])
    assert answers[0] == answers[1] and len(answers[0]) > 5
    results = []
    for init in ["--out_dir=out"], ["--out_dir=out2", "--init_from=hf"]:
        args = ["--tasks=problems", "--limit=5", "--max_new_tokens=10", "--save_generations=True"]
        run(tmp_path, "eval.py", *init, *args)
        results.append((tmp_path / init[0][10:] / "generations-problems.jsonl").read_text())
    assert len(results[0]) > 100
    pipe = transformers.pipeline("text-generation", model=str(tmp_path / "hf"), dtype=torch.float32)
    reply = pipe([{"role": "user", "content": question}], max_new_tokens=20)[0]["generated_text"][-1]["content"]
    assert reply == answers[0].rstrip("\n")
    tuned = ["--init_from=hf", "--out_dir=tuned", "--max_iters=1", "--bp_min=5", "--learning_rate=0.0"]
    run(tmp_path, "train.py", *shape, *tuned)
    losses = [
        json.loads(line).get("val_loss") for out in ("out", "tuned") for line in open(tmp_path / out / "log.jsonl")
    ]
    assert losses[-1] == pytest.approx(next(loss for loss in losses if loss), rel=1e-5)
