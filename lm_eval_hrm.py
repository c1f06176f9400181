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
from evaluate import read_packed
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
    def __init__(self, pretrained="out", condition="", batch_size=64, max_gen_toks=1024, max_batch_size=None, **how):
        super().__init__()
        if unknown := how.keys() - {"device", "dtype", "H_cycles", "L_cycles", "guidance"}:
            raise ValueError(f"model_args has {min(unknown)}, which the model hrm does not")
        how["condition"] = str(condition).replace("+", ",")
        self.model, self.encoding, self.condition = load_for_inference(str(pretrained), **how)
        self.batch_size = 64 if str(batch_size).startswith("auto") else int(batch_size)
        self.max_gen_toks, self.block_size = max_gen_toks, self.model.config.block_size

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
        prefix, windows, owners = encode_prompt(self.encoding, "", self.condition), [], []
        n = max(2, self.block_size + 1 - len(prefix))  # ids of a response in a row, of which the last is not read
        for i, request in enumerate(requests):
            ids, done = self.encoding.encode(request.args[0]), 0
            while done < len(ids):
                end = min(len(ids), done + n - (done > 0))  # a later window reads one id more at least than it scores
                windows.append((prefix, ids[max(0, end - n) : end], end - done))
                owners.append(i)
                done = end
        sums = [0.0] * len(requests)
        for i, (log_p, _) in zip(owners, self.score(windows, disable_tqdm)):
            sums[i] += log_p
        return sums

    def score(self, documents, disable_tqdm):
        """loglikelihood() of (ids of a prefix, ids of its response, how many of the last are scored). Documents that
        differ in the last id alone, as choices of one token, are read once."""
        same, results = {}, [(0.0, True)] * len(documents)  # for an empty response
        for i, (prefix, response, n) in enumerate(documents):
            if n:
                same.setdefault(((*prefix, *response)[:-1], len(prefix), n), []).append(i)
        reads = [*same]
        packed = read_packed(self.model, reads)
        for read, logits in tqdm(packed, "likelihoods", len(reads), unit=" texts", disable=disable_tqdm):
            log_p, best = logits.log_softmax(-1).cpu(), logits.argmax(-1).tolist()
            for i in same[reads[read]]:
                ids = documents[i][1][-len(best) :]
                results[i] = sum(log_p[range(len(ids)), ids].tolist()), best == ids
        return results

    # ---- generation ----
    def generate_until(self, requests, disable_tqdm=False):
        """The texts that continue the contexts, up to eoa, a stop string of the request, or max_gen_toks."""
        groups, stops, answers = {}, [], [b""] * len(requests)
        for i, request in enumerate(requests):
            options = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            stops.append([text.encode() for text in options.pop("until") if text])
            options.setdefault("temperature", float(options.pop("do_sample")))
            groups.setdefault(json.dumps(options, sort_keys=True), []).append(i)
        for options, members in groups.items():
            options = json.loads(options)
            most = options.pop("max_gen_toks")
            how = {key: options.pop(key) for key in ("temperature", "top_k", "top_p") if key in options}
            if options:
                print(f"the model hrm generates without {', '.join(options)}")
            rooms = [min(most, self.block_size // 2)] * len(members)
            prompts = self.prefixes([requests[i].args[0] for i in members], rooms)
            longest = min(max(map(len, prompts)) + most, self.block_size)
            how["slots"] = slots_in_memory(self.model, longest, self.batch_size)

            def is_end(k, id, members=members):
                i, token = members[k], self.encoding.decode_single_token_bytes(id)
                answers[i] += token
                return any(stop in answers[i][-len(stop) - len(token) :] for stop in stops[i])

            how |= dict(stop_token=special_id(self.encoding, "eoa"), seed=torch.initial_seed(), is_end=is_end)
            with tqdm(total=len(members), desc="generation", unit=" answers", disable=disable_tqdm) as bar:
                for events in stream(self.model, prompts, most, **how):
                    bar.update(sum(id is None for _, id in events))
        ends = [min((a.find(stop) for stop in some if stop in a), default=None) for a, some in zip(answers, stops)]
        return [answer[:end].decode("utf-8", errors="replace") for answer, end in zip(answers, ends)]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    with exit_on_error():
        cli_evaluate()
