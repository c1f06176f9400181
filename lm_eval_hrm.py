"""The model "hrm" of EleutherAI's lm-evaluation-harness (pip install lm-eval), whose own `hf` reads prompts causally.

    python lm_eval_hrm.py --model hrm --model_args pretrained=out-gsm8k --tasks gsm8k --apply_chat_template
    python lm_eval_hrm.py --model hrm --model_args pretrained=sapientinc/HRM-Text-1B,condition=synth+cot --tasks ...

The command line is lm_eval's, which alone does not know this file. model_args: pretrained (a run's directory, or in the
Hugging Face layout a directory or hub id), condition (several with + between; none; else as most of its training),
dtype, max_gen_toks, H_cycles, L_cycles and guidance. --batch_size (auto: 64) is of answers; likelihoods fill rows.

A context is the instruction of a document, which the model reads in both directions, and a continuation is what its
response begins with: eoa is not scored. The harness puts a space before a continuation, where responses have none,
unless --apply_chat_template is given; the template here is the text alone. An empty context is an empty instruction.
loglikelihood_rolling takes a text as the response to that; one beyond the context is read in windows, each of them full
and scored from where the one before has ended. Too long an instruction loses its first tokens, and a line says so.
"""

import json
import sys

import torch
from tqdm import tqdm

from common import exit_on_error
from generate import load_for_inference, slots_in_memory, stream
from tokenizer import encode_prompt, special_id

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as e:
    sys.exit(f"lm_eval_hrm.py needs the package lm-eval (pip install lm-eval): {e}")


@register_model("hrm")
class HRMForHarness(LM):
    def __init__(
        self, pretrained="out", condition="", batch_size=64, device="auto", dtype="auto", max_gen_toks=1024, **depth
    ):
        super().__init__()
        depth.pop("max_batch_size", None)  # the harness gives it
        if unknown := depth.keys() - {"H_cycles", "L_cycles", "guidance"}:
            raise ValueError(f"model_args has {min(unknown)}, which the model hrm does not")
        options = dict(device=device, dtype=dtype, condition=str(condition).replace("+", ","), **depth)
        self.model, self.encoding, self.condition = load_for_inference(str(pretrained), **options)
        self.batch_size = 64 if str(batch_size).startswith("auto") else int(batch_size)
        self.max_gen_toks, self.block_size = max_gen_toks, self.model.config.block_size

    # ---- prompts ----
    @property
    def tokenizer_name(self):
        return self.encoding.name.replace("/", "__")

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return "\n\n".join(message["content"] for message in chat_history)

    def prefixes(self, contexts, rooms):
        """The ids of each context's prefix, which leave `room` of the block_size places to the response."""
        n_head, found, cut = len(encode_prompt(self.encoding, "", self.condition)) - 1, [], 0
        for context, room in zip(contexts, rooms):
            ids = encode_prompt(self.encoding, context, self.condition)
            surplus = max(0, len(ids) + room - self.block_size)
            if surplus > len(ids) - n_head - 1:
                raise ValueError(f"a continuation of {room + 1:,} tokens leaves no place for its prompt")
            found.append(ids[:n_head] + ids[n_head + surplus :])
            cut += surplus > 0
        if cut:
            print(f"{cut:,} of {len(found):,} contexts are too long for block_size = {self.block_size:,} and were cut")
        return found

    # ---- likelihoods ----
    def loglikelihood(self, requests, disable_tqdm=False):
        """[(sum of log p of the continuation's tokens, whether each has the largest logit)] of the requests."""
        responses = [self.encoding.encode(request.args[1]) for request in requests]
        prefixes = self.prefixes([request.args[0] for request in requests], [max(len(r) - 1, 0) for r in responses])
        return self.score([(p, r, len(r)) for p, r in zip(prefixes, responses)], disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """[sum of log p of all tokens] of the requests."""
        prefix, documents, owners = encode_prompt(self.encoding, "", self.condition), [], []
        n = max(2, self.block_size + 1 - len(prefix))  # ids of a response in a row, of which the last is not read
        for i, request in enumerate(requests):
            ids, done = self.encoding.encode(request.args[0]), 0
            while done < len(ids):
                end = min(len(ids), done + n - (done > 0))  # a later window reads one id more at least than it scores
                documents.append((prefix, ids[max(0, end - n) : end], end - done))
                owners.append(i)
                done = end
        sums = [0.0] * len(requests)
        for i, (log_p, _) in zip(owners, self.score(documents, disable_tqdm)):
            sums[i] += log_p
        return sums

    @torch.inference_mode()
    def score(self, documents, disable_tqdm):
        """loglikelihood() of (ids of a prefix, ids of its response, how many of the last are scored), in packed rows of
        documents of similar lengths. Those that differ in the last id alone, as choices of one token, are read once."""
        same, rows, n_ids = {}, [], self.block_size
        for i, (prefix, response, n) in enumerate(documents):
            same.setdefault(((*prefix, *response)[:-1], len(prefix), n), []).append(i)
        for document in sorted(same, key=lambda document: -len(document[0])):  # if memory is short, then at once
            if n_ids + len(document[0]) > self.block_size:
                rows.append([])
                n_ids = 0
            rows[-1].append(document)
            n_ids += len(document[0])
        results = [None] * len(documents)
        for row in tqdm(rows, desc="likelihoods", unit=" rows", disable=disable_tqdm):
            idx, doc, prefix, at = [], [], [], []
            place, targets, members = [], [], []  # of each target the place in `at`; whose these are
            for number, (ids, n_prefix, n) in enumerate(row):
                idx += ids
                doc += [number] * len(ids)
                prefix += [k < n_prefix for k in range(len(ids))]
                for i in same[ids, n_prefix, n]:
                    members.append((i, slice(len(place), len(place) + n)))
                    place += range(len(at), len(at) + n)
                    targets += documents[i][1][len(documents[i][1]) - n :]
                at += range(len(idx) - n, len(idx))
            idx, doc, prefix = (torch.tensor([x]) for x in (idx, doc, prefix))
            logits, _ = self.model(idx, None, doc, prefix, at=torch.tensor(at, dtype=torch.long))
            place, targets = torch.tensor([place, targets], dtype=torch.long, device=logits.device)
            log_p = logits.log_softmax(-1)[place, targets].tolist()
            right = (logits.argmax(-1)[place] == targets).tolist()
            for i, part in members:
                results[i] = sum(log_p[part]), all(right[part])
        return results

    # ---- generation ----
    def generate_until(self, requests, disable_tqdm=False):
        """The texts that continue the contexts, up to eoa, a stop string of the request, or max_gen_toks."""
        groups, answers = {}, [""] * len(requests)
        for i, request in enumerate(requests):
            options = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            until = [text.encode() for text in options.pop("until") if text]
            groups.setdefault(json.dumps(options, sort_keys=True), []).append((i, until))
        for options, members in groups.items():
            options, new = json.loads(options), [b"" for _ in members]
            most, sampled = options.pop("max_gen_toks"), options.pop("do_sample")
            temperature = options.pop("temperature", 1.0 if sampled else 0.0)
            top_k, top_p = options.pop("top_k", None), options.pop("top_p", None)
            if options:
                print(f"the model hrm generates without {', '.join(options)}")
            rooms = [min(most, self.block_size // 2)] * len(members)
            prompts = self.prefixes([requests[i].args[0] for i, _ in members], rooms)
            slots = slots_in_memory(self.model, min(max(map(len, prompts)) + most, self.block_size), self.batch_size)

            def is_end(k, id, new=new, members=members):
                token = self.encoding.decode_single_token_bytes(id)
                new[k] += token
                return any(text in new[k][-len(text) - len(token) :] for text in members[k][1])

            options = temperature, top_k, top_p, special_id(self.encoding, "eoa"), torch.initial_seed(), slots, is_end
            with tqdm(total=len(members), desc="generation", unit=" answers", disable=disable_tqdm) as bar:
                for events in stream(self.model, prompts, most, *options):
                    bar.update(sum(id is None for _, id in events))
            for (i, until), text in zip(members, new):
                ends = (text.find(stop) for stop in until if stop in text)
                answers[i] = text[: min(ends, default=None)].decode("utf-8", errors="replace")
        return answers


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    with exit_on_error():
        cli_evaluate()
