"""Whole runs of train.py, sample.py and eval.py, as a user starts them."""

import json
import shutil
import subprocess

import pytest
import torch
from scripts import ENV, TINY, command, run

import devices
from devices import ThreadsByLoad, cpu_multiplies_bf16


def read_log(out, key="loss"):
    """{iter: value} of log.jsonl."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {e["iter"]: e[key] for e in entries if key in e}


def checkpoint(out, name="ckpt.pt"):
    return torch.load(out / name, weights_only=True)


def averages(out):
    """{name: moving average of the weight} in a checkpoint."""
    ckpt = checkpoint(out)
    names = (name for name in ckpt["model"] if name != "z_L_init")
    return {name: ckpt["optimizer"]["state"][i]["ema"] for i, name in enumerate(names)}


def test_schedules_and_log(workplace):
    args = [*TINY, "--max_iters=50", "--log_interval=1", "--warmup_iters=9", "--decay=0.2", "--sample_prompts=2"]
    said = run(workplace, "train.py", *args, PLOTS="1").stdout
    assert said.count("? -> ") + said.count(". -> ") == 2  # instructions of val, and the model's answers
    lr, bp_steps = read_log(workplace / "out", "lr"), read_log(workplace / "out", "bp_steps")
    assert lr[1] == pytest.approx(1e-4) and lr[10] == lr[40] == pytest.approx(1e-3) and lr[46] == pytest.approx(5e-4)
    assert [bp_steps[i] for i in (1, 4, 5, 7, 8, 10, 11, 50)] == [2, 2, 3, 3, 4, 4, 5, 5]
    for key in "tokens_per_sec", "grad_norm", "weight_norm", "accuracy", "epoch", "seconds":
        values = read_log(workplace / "out", key)
        assert set(values) == set(range(1, 51)) and all(value >= 0 for value in values.values())
    epoch, tokens = read_log(workplace / "out", "epoch"), read_log(workplace / "out", "tokens")
    in_an_epoch = json.loads((workplace / "out" / "meta.json").read_text())["splits"]["train"]
    of_input = in_an_epoch["tokens"] - in_an_epoch["documents"]
    assert epoch[50] == pytest.approx(tokens[50] / of_input, abs=0.05)
    assert (workplace / "out" / "loss.svg").stat().st_size > 10000


def test_a_run_resumes_with_its_own_settings_and_its_average_is_not_its_start(workplace):
    """The average of a short run has nearly the loss of its last steps, as its decay ramps up."""
    run(workplace, "train.py", *TINY, "--max_iters=60", "--ema=0.999", "--learning_rate=3e-3", "--log_interval=60")
    loss, val_loss = (read_log(workplace / "out", key)[60] for key in ("loss", "val_loss"))
    assert abs(val_loss - loss) < 0.3
    run(workplace, "train.py", "--init_from=resume", "--max_iters=61", "--log_interval=1")
    settings = json.loads((workplace / "out" / "run.json").read_text())["settings"]
    assert settings["learning_rate"] == 3e-3 and settings["n_embd"] == 32 and settings["max_iters"] == 61
    assert read_log(workplace / "out", "lr")[61] == 3e-3
    (workplace / "out" / "run.json").write_text('{"settings": {"learning_rate": "fast"}}')
    done = run(workplace, "train.py", "--init_from=resume", ok=False)
    assert "out/run.json is damaged: learning_rate is 'fast'" in done.stderr


def test_threads_follow_the_load(monkeypatch):
    """Threads that wait for a core become fewer; after a minute all are tried again. A number set by the user stays."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    clock, waited, n = [0.0], [0.0], [4]
    monkeypatch.setattr(devices.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(ThreadsByLoad, "_waited", lambda self: waited[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: n[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda new: n.__setitem__(0, new))
    threads = ThreadsByLoad()
    threads.fixed = False  # where there is no /proc too
    told, numbers = [], []
    for second in range(1, 70):
        clock[0], waited[0] = second, waited[0] + (1.1 if second == 3 else 0.05)
        told.append(threads.adapt(torch.device("cpu")))
        numbers.append(n[0])
    assert numbers == [4] * 2 + [2] * 61 + [4] * 6 and [x for x in told if x] == [2]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert ThreadsByLoad().fixed


def test_cpus_that_multiply_bf16_train_in_it_by_default(workplace):
    said = run(workplace, "train.py", *TINY, "--dtype=auto", "--max_iters=20", "--log_interval=1").stdout
    assert f", {'bfloat16' if cpu_multiplies_bf16() else 'float32'}, compile" in said
    losses = read_log(workplace / "out")
    assert losses[20] < 0.9 * losses[1]
    assert {w.dtype for w in checkpoint(workplace / "out")["model"].values()} == {torch.float32}


def test_sample_and_eval_use_the_checkpoint(workplace):
    run(workplace, "train.py", *TINY, "--max_iters=10")
    run(workplace, "eval.py", "--max_new_tokens=8")
    result = json.loads((workplace / "out" / "eval.json").read_text())["tasks"]["heldout"]
    assert result["count"] == 20 and 0 <= result["accuracy"] + result["invalid"] <= 1
    shutil.rmtree(workplace / "data")  # out/ is enough for the others
    run(workplace, "eval.py", "--tasks=problems", "--save_generations=True", "--limit=7", "--max_new_tokens=8")
    rows = [json.loads(line) for line in (workplace / "out" / "generations-problems.jsonl").read_text().splitlines()]
    assert len(rows) == 7 and all(r["score"] in (0, 1) and not r["over_long"] for r in rows)
    questions = [{"question": "What is 3 + 4?", "answer": "3+4=<<3+4=7>>7\n#### 7"}] * 3
    (workplace / "gsm8k").mkdir()
    (workplace / "gsm8k" / "test.jsonl").write_text("\n".join(map(json.dumps, questions)))
    shown = run(workplace, "eval.py", "--tasks=gsm8k", "--data_dir=.", "--max_new_tokens=8").stdout
    assert "gsm8k" in shown and "invalid" in shown
    (workplace / "question.txt").write_text("How many?")
    sampled = [
        run(workplace, "sample.py", f"--prompt={p}", "--max_new_tokens=9", "--num_samples=2", "--temperature=1.").stdout
        for p in ("How many?", "FILE:question.txt", "How many?")
    ]
    assert sampled[0] == sampled[1].replace("FILE:question.txt", "How many?") == sampled[2]
    assert sampled[0].count("--- sample") == 2
    interactive = command("sample.py", "--interactive=True", "--max_new_tokens=4")
    asked = subprocess.run(interactive, cwd=workplace, env=ENV, input="One?\nTwo?\n", capture_output=True, text=True)
    assert asked.returncode == 0 and asked.stdout.count("---") == 2


def test_fine_tuning_starts_from_the_averaged_weights(workplace):
    run(workplace, "train.py", *TINY, "--max_iters=10", "--ema=0.9")
    still = ["--learning_rate=0.0", "--max_iters=1", "--bp_min=5", "--out_dir=tuned", "--init_from=out"]
    run(workplace, "train.py", *TINY, *still, "--n_embd=64")  # the shape is the model's own
    tuned = checkpoint(workplace / "tuned")["model"]
    before, after = (read_log(workplace / name, "val_loss") for name in ("out", "tuned"))
    assert after[1] == pytest.approx(before[10], rel=1e-6)
    run(workplace, "train.py", *TINY, *still[1:-1], "--max_iters=3", "--n_embd=64", "--init_from=resume")
    assert checkpoint(workplace / "tuned")["iter"] == 3
    start = {**checkpoint(workplace / "out")["model"], **averages(workplace / "out")}
    for key, w in tuned.items():
        assert torch.equal(w, start[key]), key


def test_another_tokenizer_or_other_data_are_refused(workplace):
    run(workplace, "train.py", *TINY, "--max_iters=1")
    rows = "".join(json.dumps({"instruction": f"{i}?", "response": f"{i}!"}) + "\n" for i in range(50))
    (workplace / "rows.jsonl").write_text(rows)
    run(workplace, "data.py", "--dataset=other", "--source=rows.jsonl")
    done = run(workplace, "train.py", *TINY, "--dataset=other", "--init_from=resume", ok=False)
    assert "is not the data that the run had" in done.stderr and "Traceback" not in done.stderr
    run(workplace, "data.py", "--dataset=bpe", "--source=problems", "--n_problems=99", "--tokenizer=train:263")
    done = run(workplace, "train.py", *TINY, "--dataset=bpe", "--init_from=out", "--out_dir=tuned", ok=False)
    assert "out (bytes, 263 ids) and data/bpe (train:263" in done.stderr and "Traceback" not in done.stderr


def test_bench_measures_and_says_so(workplace):
    small = "--n_layer=2 --n_head=2 --n_embd=32 --vocab_size=300 --block_size=256 --batch_size=1 --n_prompts=3"
    small += " --max_new_tokens=4 --rounds=1 --peer=False --compile=False --device=cpu --tokenizer=bytes --data_mb=1"
    done = run(workplace, "bench.py", "train", "decode", "data", *small.split())
    tables = json.loads((workplace / "bench.json").read_text())["tables"]
    assert tables.keys() == {"train", "decode", "data"} and "kept for the backward pass" in done.stdout
    assert all(value > 0 for value in tables["train"]["ours"].values())
    assert tables["data"]["data.py"]["of tiktoken"] > 0 and tables["decode"]["3 prompts: ours"]["tokens/s"] > 0
    failed = run(workplace, "bench.py", "trian", ok=False)
    assert failed.stderr.splitlines() == ["bench.py: there is no task trian, only all, train, decode, data, compile"]


def test_parts_of_bench_gpu(workplace):
    """Without a card its parts give figures too, or say why not; one that fails is told, and the others go on."""
    small = "--n_layer=2 --n_head=2 --n_embd=32 --vocab_size=300 --block_size=128 --sizes=(1,2,4,8) --rows=1".split()
    small += "--n_prompts=3 --max_new_tokens=6 --compile=False --device=cpu --dtype=float32".split()
    run(workplace, "bench_gpu.py", *small)
    content = json.loads((workplace / "bench_gpu.json").read_text())
    tables = content["tables"]
    assert list(tables) == "correct gemm flex step inputs blocks long profile decode all-reduce".split()
    assert not content["failed"] and tables["flex"]["flex"] == {"result": "needs cuda"}
    assert tables["correct"]["bfloat16, sdpa"]["gradients"] > 0
    assert [list(tables[part]) for part in ("step", "inputs", "blocks", "long")] == [
        [f"micro-batches of {size}" for size in sizes] for sizes in ([1, 2, 4, 8], [4, 8], [8], [2])
    ]
    assert all(row["tokens/s"] > 0 and row["of the GEMM rate"] > 0 for row in tables["step"].values())
    assert [row["tokens/s"] > 0 for row in tables["decode"].values()] == [True, True]
    failed = run(workplace, "bench_gpu.py", *small, "--n_head=3", "--parts=profile,flex", ok=False)
    assert "part profile failed: n_embd (32) must be a multiple" in failed.stdout and "needs cuda" in failed.stdout
    assert failed.stderr.splitlines() == ["bench_gpu.py: not all parts have run: profile"]
    failed = run(workplace, "bench_gpu.py", "--parts=gem", ok=False)
    assert failed.stderr.startswith("bench_gpu.py: there is no part gem, only correct, gemm")
