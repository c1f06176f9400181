"""
The model "hrm" of EleutherAI's lm-evaluation-harness (pip install lm-eval).

$ python -m tools.lm_eval_hrm --model hrm --model_args pretrained=out --tasks gsm8k \
    --apply_chat_template
$ python -m tools.lm_eval_hrm --model hrm --tasks gsm8k --apply_chat_template \
    --model_args pretrained=sapientinc/HRM-Text-1B,condition=synth+cot
$ torchrun --nproc_per_node=8 -m tools.lm_eval_hrm ...     # 8 GPUs share the questions

The command line is lm-eval's. model_args: pretrained (a run, a directory or a hub id), condition
(several with + between, or none), max_gen_toks, dtype, H_cycles, L_cycles, guidance.

A context is the instruction of a document, which the model reads in both directions (lm-eval's own
model "hf" reads it causally), and a continuation is the beginning of its response; eoa is not
scored. lm-eval puts a space before a continuation, unless --apply_chat_template is given; here the
template is the text alone. An instruction that is too long loses its first tokens. Of generation's
settings, temperature, max_gen_toks and until are known.
"""

import os
import sys
from collections import defaultdict

import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint import find_directory
from generate import load_for_inference, stream
from tokenizer import known_conditions

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    sys.exit(f"this needs lm-evaluation-harness (pip install lm-eval): {error}")


@register_model("hrm")
class HRMForHarness(LM):
    tokenizer_name = "hrm"  # of caches; the template does not depend on it

    def __init__(
        self,
        pretrained="out",
        condition="",
        device="auto",
        batch_size=64,
        max_batch_size=None,
        max_gen_toks=1024,
        **options,
    ):
        super().__init__()
        self._world_size = int(os.environ.get("WORLD_SIZE", 1))
        if self._world_size > 1:
            dist.init_process_group("gloo")
            self._rank = dist.get_rank()
        if device.startswith("cuda") and not torch.cuda.is_available():
            print(f"there is no {device}, lm-eval's default: taking what there is")
            device = "auto"
        if device.startswith("cuda") and self._world_size > 1:
            device = "cuda"  # rank r takes cuda:r
        self.model, self.tokenizer = load_for_inference(pretrained, device, **options)
        known = known_conditions(find_directory(pretrained))
        self.condition = condition.replace("+", ",")
        if known and not condition:
            self.condition = known[0]
        self.block_size = self.model.config.block_size
        self.batch_size = 64 if str(batch_size).startswith("auto") else int(batch_size)
        self.max_gen_toks = max_gen_toks

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return "\n\n".join(message["content"] for message in chat_history)

    def all_gather(self, tensor):
        shares = [torch.empty_like(tensor) for _ in range(self._world_size)]
        dist.all_gather(shares, tensor)
        return torch.stack(shares)

    def gather_object(self, obj, dst=0):
        shares = [None] * self._world_size if self._rank == dst else None
        dist.gather_object(obj, shares, dst)
        return shares

    def prompt(self, context, room):
        """The prefix of a context, cut so that it leaves `room` of the block_size places."""
        ids = self.tokenizer.prompt(context, self.condition)
        n_head = len(self.tokenizer.prompt("", self.condition)) - 1  # boq and tags
        n_cut = max(0, len(ids) + room - self.block_size)
        assert n_cut < len(ids) - n_head, f"{room:,} tokens leave no room for their prompt"
        return ids[:n_head] + ids[n_head + n_cut :]

    # -------------------------------------------------------------------------
    # likelihoods

    def loglikelihood(self, requests, disable_tqdm=False):
        """[(sum of log p of the continuation, whether each token is the likeliest)]."""
        return self.score([request.args for request in requests], disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """[sum of log p of a text], as the response to an empty instruction."""
        pairs = [("", request.args[0]) for request in requests]
        return [log_p for log_p, _ in self.score(pairs, disable_tqdm)]

    @torch.no_grad()
    def score(self, pairs, disable_tqdm):
        """loglikelihood() of (context, continuation)."""
        responses = [self.tokenizer.encode(continuation) for _, continuation in pairs]
        # documents that differ in the last token alone, as choices of one token, are read once
        same = defaultdict(list)
        for i, response in enumerate(responses):
            if response:
                prefix = self.prompt(pairs[i][0], len(response) - 1)
                ids = (*prefix, *response[:-1])
                same[ids, len(prefix)].append(i)
        rows, room = [], 0
        longest_first = sorted(same, key=lambda document: -len(document[0]))
        for ids, n_prefix in longest_first:
            if len(ids) > room:
                rows.append([])
                room = self.block_size
            rows[-1].append((ids, n_prefix))
            room -= len(ids)

        results = [(0.0, True)] * len(pairs)  # of empty continuations
        for row in tqdm(rows, "likelihoods", disable=disable_tqdm):
            idx = torch.zeros(1, self.block_size, dtype=torch.long)
            doc = torch.full_like(idx, -1)
            is_prefix = torch.zeros_like(idx, dtype=torch.bool)
            end = 0
            for number, (ids, n_prefix) in enumerate(row):
                start, end = end, end + len(ids)
                idx[0, start:end] = torch.tensor(ids)
                doc[0, start:end] = number
                is_prefix[0, start : start + n_prefix] = True
            logits = self.model(idx, doc=doc, prefix=is_prefix)[0][0]
            end = 0
            for ids, n_prefix in row:
                start, end = end, end + len(ids)
                log_p = logits[start + n_prefix - 1 : end].log_softmax(-1).cpu()
                for i in same[ids, n_prefix]:
                    likeliest = log_p.argmax(-1).tolist()
                    total = log_p[range(len(log_p)), responses[i]].sum()
                    results[i] = total.item(), likeliest == responses[i]
        return results

    # -------------------------------------------------------------------------
    # generation

    def generate_until(self, requests, disable_tqdm=False):
        """The texts that continue the contexts, up to eoa, a stop string, or max_gen_toks."""
        groups = defaultdict(list)  # {temperature: numbers of requests}
        prompts, limits, stops = [], [], []
        for i, request in enumerate(requests):
            options = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            limit = options["max_gen_toks"]
            room = min(limit, self.block_size // 2)
            prompts.append(self.prompt(request.args[0], room))
            limits.append(limit)
            stops.append(options["until"])
            temperature = options.get("temperature", float(options["do_sample"]))
            groups[temperature].append(i)
        answers = [[] for _ in requests]
        bar = tqdm(total=len(requests), desc="answers", disable=disable_tqdm)
        for temperature, members in groups.items():
            events = stream(
                self.model,
                [prompts[i] for i in members],
                [limits[i] for i in members],
                stop_token=self.tokenizer.id_of["eoa"],
                temperature=temperature,
                seed=torch.initial_seed(),
                slots=self.batch_size,
            )
            for k, id in events:
                if id is None:
                    bar.update()
                else:
                    answers[members[k]].append(id)
        bar.close()
        texts = [self.tokenizer.decode(answer) for answer in answers]
        for i, some in enumerate(stops):
            for stop in filter(None, some):
                texts[i] = texts[i].partition(stop)[0]
        return texts


if __name__ == "__main__":
    cli_evaluate()
