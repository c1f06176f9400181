"""The Hugging Face layout, in and out: config.json, weights and tokenizer.

    python hf.py --out_dir=out --export_dir=out-hf       # exports a run of train.py
"""

from configurator import configure

import json
from dataclasses import fields
from pathlib import Path

import torch

from common import errors_name_file, exit_on_error, read_json, replace_files
from devices import choose_device
from model import HRM, BlockWeights, HRMConfig, weight_shapes
from tokenizer import CONDITIONS, SPECIAL, byte_alphabet, choose_condition, load_encoding, portable, special_id

# ---- settings ----
out_dir = "out"  # of train.py
export_dir = "out-hf"  # where to write its config.json, model.safetensors and tokenizer.json
average = True  # the weights' moving average; False: the weights themselves
dtype = "float32"  # of the weights written, or bfloat16
settings = configure(globals())


# ---- config.json and model.safetensors ----
HF_CONFIG = {  # their name: ours, and the type
    "vocab_size": ("vocab_size", int),
    "hidden_size": ("n_embd", int),
    "intermediate_size": ("n_ff", int),
    "num_attention_heads": ("n_head", int),
    "head_dim": ("head_dim", int),
    "H_cycles": ("H_cycles", int),
    "L_cycles": ("L_cycles", int),
    "max_position_embeddings": ("block_size", int),
    "rms_norm_eps": ("norm_eps", float),
    "rope_theta": ("rope_theta", float),
    "embedding_scale": ("embed_scale", float),
    "prefix_lm": ("prefix_lm", bool),
}
HF_FIXED = {"model_type": "hrm_text", "hidden_act": "silu", "tie_word_embeddings": False}  # nothing else is built here
HF_FIXED |= {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "rope_scaling": None}
HF_DEFAULTS = {"head_dim": 128, "prefix_lm": True, "H_cycles": 2, "L_cycles": 3, "rms_norm_eps": 1e-6}
HF_DEFAULTS |= {"rope_theta": 1e4, "initializer_range": 0.02}
HF_WITHOUT = 0, False, None, "hrm", "magic"  # values of our other settings that ask for nothing that it lacks
HF_OUTSIDE = {"embed": "model.embed_tokens.weight", "lm_head": "lm_head.weight", "z_L_init": "model.z_L_init"}
HF_PARTS = {"gqkv_proj": ("gate_proj", "q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def read_hf_config(path):
    """config.json -> HRMConfig. Raises ValueError that names a setting which this model does not have."""
    hf = {**HF_DEFAULTS, **{key: value for key, value in read_json(path).items() if value is not None}}
    if hf.get("model_type") != "hrm_text":
        raise ValueError(f"{path}: model_type is {hf.get('model_type')!r}, not 'hrm_text'")
    rope = hf.get("rope_parameters", {})
    rope = rope if isinstance(rope, dict) else {"type": rope}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        hf["rope_scaling"] = rope
    hf["rope_theta"] = rope.get("rope_theta", hf["rope_theta"])
    for key, only in {**HF_FIXED, "num_key_value_heads": hf.get("num_attention_heads")}.items():
        if hf.get(key, only) != only:
            raise ValueError(f"{path}: {key} = {hf[key]!r} is not supported, only {only!r}")

    def checked(key, kind=int):
        """hf[key], if it is a bool or a number above 0 of this kind."""
        if key not in hf:
            raise ValueError(f"{path} lacks {key}")
        value = hf[key]
        if type(value) not in {kind, int if kind is float else kind} or (kind is not bool and not value > 0):
            want = "true or false" if kind is bool else "number that fits"
            raise ValueError(f"{path}: {key} = {value!r} is no {want}")
        return value

    if "embedding_scale" not in hf:
        hf["embedding_scale"] = 1 / checked("initializer_range", float)
    values = {ours: checked(theirs, kind) for theirs, (ours, kind) in HF_CONFIG.items()}
    # Where transformers wrote it, num_hidden_layers counts all applications of blocks.
    per_stack = "num_layers_per_stack" if "num_layers_per_stack" in hf else "num_hidden_layers"
    with errors_name_file(path, "is of a model that cannot be"):
        return HRMConfig(n_layer=2 * checked(per_stack), **values)


def hf_names(ours, split=False):
    """Their names for a weight: H.0.o_proj -> [model.H_module.layers.0.attn.o_proj.weight]. With `split`, one for
    each projection, in the order of our rows."""
    if ours in HF_OUTSIDE:
        return [HF_OUTSIDE[ours]]
    stack, i, weight = ours.split(".")
    module = ("self_attn" if split else "attn") if weight in ("gqkv_proj", "o_proj") else "mlp"
    parts = HF_PARTS.get(weight, [weight]) if split else [weight]
    return [f"model.{stack}_module.layers.{i}.{module}.{part}.weight" for part in parts]


def read_safetensors(directory):
    """{name: tensor} of model.safetensors, or of the files that its index lists."""
    from safetensors.torch import load_file

    files, index, tensors = ["model.safetensors"], directory / "model.safetensors.index.json", {}
    if index.is_file() and not (directory / files[0]).is_file():
        with errors_name_file(index):
            files = sorted(set(read_json(index)["weight_map"].values()))
            for file in files:
                if Path(file).name != file or not file.endswith(".safetensors"):
                    raise ValueError(f"{index} names a file outside its directory: {file}")
    for path in (directory / file for file in files):
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}")
        with errors_name_file(path):
            found = load_file(path)
        if twice := found.keys() & tensors.keys():
            raise ValueError(f"{path} holds {min(twice)}, as another file of {index.name} does")
        tensors |= found
    return tensors


def load_hf(directory):
    """The model of a directory, in fp32. Raises ValueError or OSError unless it is exactly this model."""
    directory = Path(directory)
    if not (directory / "config.json").exists():
        raise FileNotFoundError(f"{directory} has neither ckpt.pt nor config.json")
    config, tensors, state = read_hf_config(directory / "config.json"), read_safetensors(directory), {}
    with errors_name_file(directory / "config.json"):
        shapes = weight_shapes(config, len(tensors))
    for ours, want in shapes.items():
        fused, split = hf_names(ours), hf_names(ours, split=True)
        names = fused if fused[0] in tensors or tensors.keys().isdisjoint(split) else split
        shape = (want[0] // len(names), *want[1:])
        for name in names:
            if name not in tensors:
                raise ValueError(f"{directory} lacks the tensor {name}")
            tensor, kinds = tensors[name], (torch.float16, torch.bfloat16, torch.float32, torch.float64)
            if tensor.shape != shape:
                raise ValueError(f"{directory}: {name} has shape {tuple(tensor.shape)}, not {shape}")
            if tensor.dtype not in kinds or not all(bound.isfinite() for bound in tensor.float().aminmax()):
                raise ValueError(f"{directory}: {name}, of {tensor.dtype}, holds integers, NaN or infinity")
        state[ours] = torch.cat([tensors.pop(name) for name in names]).float()
    if tensors:
        raise ValueError(f"{directory} has a tensor that is not of this model: {min(tensors)}")
    with torch.device("meta"):
        model = HRM(config)
    model.load_state_dict(state, assign=True)
    return model


def save_hf(model, directory, **config):
    """Write model.safetensors, config.json and generation_config.json; `config` adds to these two. Raises ValueError
    if the model has a setting or a weight that transformers' does not have."""
    from safetensors.torch import save_file

    directory, ours, state = Path(directory), model.config, model.state_dict()
    block_weights = {f"{s}.{i}.{w}" for s in "HL" for i in range(ours.n_layer // 2) for w in BlockWeights._fields}
    held = {"n_layer", "expansion", *(name for name, _ in HF_CONFIG.values())}
    settings = {f.name: getattr(ours, f.name) for f in fields(ours) if f.name not in held}
    if settings["recurrence"] == "trm":  # an HRM whose stacks are equal
        settings["recurrence"] = "hrm"
        state |= {name.replace("H.", "L.", 1): t.clone() for name, t in state.items() if name.startswith("H.")}
    foreign = [f"{name} = {value!r}" for name, value in settings.items() if value not in HF_WITHOUT]
    if foreign := [*foreign, *sorted(state.keys() - block_weights - HF_OUTSIDE.keys())]:
        raise ValueError(f"a model with {foreign[0]} is no HRM of transformers: the layout has no place for that")
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {hf_names(name)[0]: t.detach().cpu().contiguous() for name, t in state.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    hf = {"architectures": ["HrmTextForCausalLM"], "dtype": str(model.embed.dtype).removeprefix("torch."), **HF_FIXED}
    hf |= {theirs: getattr(ours, name) for theirs, (name, _) in HF_CONFIG.items()}
    hf |= {"num_hidden_layers": ours.n_layer // 2, "num_key_value_heads": ours.n_head}
    write_json(directory / "config.json", {**hf, "initializer_range": ours.n_embd**-0.5, **config})
    write_json(directory / "generation_config.json", {"do_sample": False, **config})


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- the tokenizer ----
def encoding_to_hf(encoding):
    """The content of a tokenizer.json that gives the same ids as an Encoding."""
    alphabet, ranks = byte_alphabet(), encoding.ranks
    text = {token: "".join(alphabet[b] for b in token) for token in sorted(ranks, key=ranks.get)}
    # tiktoken merges any two neighbours that make a token, the lowest rank first: every such pair is a merge
    cuts = ((token[:i], token[i:]) for token in text for i in range(1, len(token)))
    merges = [[text[a], text[b]] for a, b in cuts if a in ranks and b in ranks]
    vocab = {t: ranks[token] for token, t in text.items()}
    if both := vocab.keys() & encoding.special_tokens.keys():
        raise ValueError(f"the layout cannot hold {min(both)!r} both as a special token and as another")
    vocab |= encoding.special_tokens  # tokenizers gives those that are not in it the ids after it
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = sorted(encoding.special_tokens.items(), key=lambda item: item[1])
    regex = {"Regex": portable(encoding.pat_str)}
    split = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    prefix = {"Sequence": {"id": "A", "type_id": 1}}  # token_type_ids 1 mark the prefix, all that a user encodes
    template = {"type": "TemplateProcessing", "single": [prefix], "pair": [prefix, prefix], "special_tokens": {}}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": content, **flags} for content, i in special],
        "normalizer": {"type": encoding.normalizer} if encoding.normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": template,
        "decoder": byte_level,
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges},
    }


def save_hf_tokenizer(encoding, directory, condition="", block_size=4096):
    """Write tokenizer.json and tokenizer_config.json; `condition` is the default of prompts."""
    chat_template = (  # encode_prompt() in Jinja, for a single user message
        f"{{%- set tags = {CONDITIONS} -%}}"
        "{%- if messages|length != 1 or messages[0]['role'] != 'user' -%}"
        "{{- raise_exception('this model answers a single user message') -}}{%- endif -%}"
        f"{{{{- '{SPECIAL['boq']}' -}}}}"
        f"{{%- for tag in (condition if condition is defined else '{condition}').split(',') if tag.strip() -%}}"
        "{%- if tag.strip() not in tags -%}{{- raise_exception('unknown condition ' + tag) -}}{%- endif -%}"
        "{{- tags[tag.strip()] -}}{%- endfor -%}"
        f"{{{{- messages[0]['content'] + '{SPECIAL['eoq']}' -}}}}"
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "eos_token": SPECIAL["eoa"],
        "pad_token": SPECIAL["eoa"],
        "padding_side": "left",
        "model_max_length": block_size,
        "condition": condition,  # ours, for choose_condition()
        "chat_template": chat_template,
    }
    write_json(Path(directory, "tokenizer.json"), encoding_to_hf(encoding))
    write_json(Path(directory, "tokenizer_config.json"), config)


if __name__ == "__main__":
    with exit_on_error():
        held = [name for name in ("ckpt.pt", "run.json", "meta.json", "train.bin") if Path(export_dir, name).exists()]
        if held or not export_dir:
            what = f"{export_dir} holds a run or a dataset ({', '.join(held)})" if held else "export_dir is empty"
            raise ValueError(f"{what}; --export_dir=NAME writes elsewhere")
        model = HRM.from_pretrained(out_dir, average).to(choose_device("cpu", dtype)[1])
        encoding = load_encoding(out_dir)
        eoa = special_id(encoding, "eoa")
        with errors_name_file(export_dir, "cannot be written"), replace_files(export_dir) as parts:
            save_hf(model, parts, eos_token_id=eoa, pad_token_id=eoa)
            save_hf_tokenizer(encoding, parts, choose_condition("", out_dir), model.config.block_size)
            names = ", ".join(sorted(path.name for path in parts.iterdir()))
        Path(export_dir, "chat_template.jinja").unlink(missing_ok=True)  # it would be preferred
        n_params, kind = sum(p.numel() for p in model.parameters()), str(model.embed.dtype).removeprefix("torch.")
        print(f"{export_dir}: {names}; the {n_params:,} weights of {out_dir}, in {kind}")
