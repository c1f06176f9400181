"""
What a run keeps. A checkpoint is a directory that is whole or not there:

    out/step-0001000/model.safetensors, config.json     the averaged weights, Hugging Face layout
    out/step-0001000/tokenizer.json, ...                of the dataset
    out/step-0001000/train.safetensors, train.json      weights, moments, counters: for resuming

So a run, an export and a model of the hub are the same thing, and load_model() reads them all.
"""

import json
import os
import re
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from model import HRM, HRMConfig

# -----------------------------------------------------------------------------
# the Hugging Face layout

HF_KEYS = {  # name in config.json: ours
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "intermediate_size": "n_ff",
    "num_attention_heads": "n_head",
    "head_dim": "head_dim",
    "H_cycles": "H_cycles",
    "L_cycles": "L_cycles",
    "max_position_embeddings": "block_size",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "embedding_scale": "embed_scale",
    "prefix_lm": "prefix_lm",
}
NOT_IN_HF = [f.name for f in fields(HRMConfig) if f.name not in (*HF_KEYS.values(), "n_layer")]
WEIGHTS = {"z_L_init", "embed_tokens", "lm_head", "gqkv_proj", "o_proj", "gate_up_proj", "down_proj"}
SPLIT = {  # transformers may save a weight in parts
    "attn.gqkv_proj": ["self_attn.gate_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.o_proj": ["self_attn.o_proj"],
    "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
}


def hf_name(name):
    return name if name.startswith("lm_head") else f"model.{name}"


def is_plain_hrm(model):
    """Whether transformers computes the same: it knows neither other recurrences and norms, nor
    settings and weights of your own."""
    own = [getattr(model.config, key) for key in NOT_IN_HF]
    names = {name.removesuffix(".weight").rpartition(".")[2] for name in model.state_dict()}
    return [value for value in own if value] == ["hrm", "magic"] and names == WEIGHTS


def save_model(directory, model, tokenizer=None):
    """
    Write model.safetensors and config.json; with the tokenizer, also generation_config.json. A
    model that transformers does not have gets another model_type, so that transformers refuses it.
    """
    config = model.config
    content = {
        "model_type": "hrm_text" if is_plain_hrm(model) else "hrm_text_variant",
        "architectures": ["HrmTextForCausalLM"],
        "dtype": "float32",
        "num_hidden_layers": config.n_layer // 2,
        "num_key_value_heads": config.n_head,
        "initializer_range": config.n_embd**-0.5,
        "tie_word_embeddings": False,
    }
    for theirs, ours in HF_KEYS.items():
        content[theirs] = getattr(config, ours)
    if content["model_type"] != "hrm_text":
        content.update({key: getattr(config, key) for key in NOT_IN_HF})
    write_json(Path(directory, "config.json"), content)
    if tokenizer:
        unused = sorted(set(range(config.vocab_size)) - set(tokenizer.tokens))
        ids = {"eos_token_id": tokenizer.id_of["eoa"], "pad_token_id": tokenizer.id_of["boq"]}
        content = {"do_sample": False, **ids, "suppress_tokens": unused or None}
        write_json(Path(directory, "generation_config.json"), content)
    tensors = {hf_name(name): t.contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, Path(directory, "model.safetensors"), {"format": "pt"})


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_config(path):
    """config.json -> HRMConfig."""
    hf = json.loads(path.read_text(encoding="utf-8"))
    if not hf.get("model_type", "").startswith("hrm_text"):
        sys.exit(f"{path}: this is no HRM but {hf.get('model_type')}")
    rope = hf.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    assert kind == "default", f"{path}: positions of the type {kind} are not built here"
    hf.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    if not hf.get("embedding_scale"):
        hf["embedding_scale"] = 1 / hf.get("initializer_range", 0.02)
    values = {ours: hf[theirs] for theirs, ours in HF_KEYS.items() if hf.get(theirs) is not None}
    values.update({key: hf[key] for key in NOT_IN_HF if key in hf})
    # where transformers wrote it, num_hidden_layers counts each use of a block
    n_blocks = hf.get("num_layers_per_stack") or hf["num_hidden_layers"]
    return HRMConfig(n_layer=2 * n_blocks, **values)


def load_model(name):
    """The fp32 model of a run (its averaged weights), a directory, or a hub id."""
    directory = find_directory(name)
    with torch.device("meta"):
        model = HRM(read_config(directory / "config.json"))
    tensors = {}
    for path in directory.glob("model*.safetensors"):
        tensors.update(load_file(path))
    state = {our_name: take_tensor(tensors, our_name) for our_name in model.state_dict()}
    assert not tensors, f"{directory} has tensors that this model lacks: {', '.join(tensors)}"
    model.load_state_dict(state, assign=True)
    return model.eval()


def take_tensor(tensors, our_name):
    name = hf_name(our_name)
    names = [name]
    for fused, parts in SPLIT.items():
        if fused in name and name not in tensors:
            names = [name.replace(fused, part) for part in parts]
    missing = [name for name in names if name not in tensors]
    assert not missing, f"the model has no tensor {missing[0]}"
    return torch.cat([tensors.pop(name).float() for name in names])


def find_directory(name):
    """Where a model is: the newest checkpoint of a run, a directory, or a download of a hub id."""
    directory = Path(name)
    if checkpoints(directory):
        return latest_checkpoint(directory) or sys.exit(f"no checkpoint in {name} can be read")
    if (directory / "config.json").exists():
        return directory
    if directory.exists() or name.count("/") != 1:
        sys.exit(f"there is no model in {name}; python train.py --out_dir={name} trains one")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        sys.exit(f"there is no directory {name}, and the hub does not give it: {error}")


# -----------------------------------------------------------------------------
# the state of training


def checkpoints(out_dir):
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in Path(out_dir).glob("step-*") if re.fullmatch(r"step-\d+", path.name))


def latest_checkpoint(out_dir):
    """The newest checkpoint that can be read, or None."""
    for path in reversed(checkpoints(out_dir)):
        try:
            json.loads((path / "train.json").read_text())
            for name in "model.safetensors", "train.safetensors":
                safe_open(path / name, "pt")  # fails unless the file is as long as it should be
            return path
        except Exception as error:
            if os.environ.get("RANK", "0") in ("", "0"):
                print(f"{path} cannot be read ({error}); the checkpoint before it serves")
    return None


def save_checkpoint(out_dir, state, model, optimizer, average, tokenizer, files=(), keep=2):
    """
    Write a checkpoint beside its place, flush it, and rename it; the newest `keep` stay.
    state: plain values, with "iter". files: to copy. What cannot be written, to a full disk, say,
    is told and costs this checkpoint alone.
    """
    part = Path(out_dir, "part")
    place = Path(out_dir, f"step-{state['iter']:07d}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        with average.in_use():
            save_model(part, model, tokenizer)
        name_of = {p: name for name, p in model.named_parameters()}
        tensors = {f"weight/{name}": p.detach() for p, name in name_of.items()}
        for p, values in optimizer.state.items():
            for key, value in values.items():
                tensors[f"{key}/{name_of[p]}"] = torch.as_tensor(value)
        save_file(tensors, part / "train.safetensors")
        write_json(part / "train.json", state)
        for path in files:
            shutil.copy(path, part)
        for path in part.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        print(f"{place} cannot be written: {error}")
        return
    shutil.rmtree(place, ignore_errors=True)  # one that could not be read
    part.rename(place)
    for old in checkpoints(out_dir)[:-keep]:
        shutil.rmtree(old)
    print(f"saved {place}")


def load_checkpoint(directory, model, optimizer, average):
    """Put weights, moments and averages in place."""
    averages = load_file(directory / "model.safetensors")
    train = load_file(directory / "train.safetensors")
    state, number = {}, {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            number[p] = len(number)  # as torch counts them in a state_dict
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(averages[hf_name(name)])
        for name, p in model.named_parameters():
            p.copy_(train.pop(f"weight/{name}"))
            average.tensors[name].copy_(averages[hf_name(name)])
            keys = [key for key in train if key.endswith(f"/{name}")]
            if keys:
                state[number[p]] = {key.partition("/")[0]: train[key] for key in keys}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
