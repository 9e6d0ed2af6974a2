"""Train a LoRA of SmolLM2-135M-Instruct by DPO for both rewards of the demo, valence and `rm`.

    OMP_NUM_THREADS=1 python -m examples.smollm2.train MODELS OUT

reads `MODELS/sft` and `MODELS/rm` (of build.py) and writes `OUT/lora_<step>.safetensors`; `OUT/responses.json` keeps what was
sampled for the next run. Prompts have the form of the demo's prompts and other subjects; responses are sampled as the demo's are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from examples.smollm2.valence import valence
from expo_ray.config import Sampling, load_job

JOB = Path(__file__).resolve().parent.parent / "smollm2.yaml"
SUBJECTS = (
    "The car chase", "The child actor", "The closing song", "The comic relief", "The courtroom scene", "The evil twin",
    "The first hour", "The flashback", "The heist", "The last scene", "The lighting", "The makeup",
)  # fmt: skip
VERBS = (
    "almost made me", "always seems to", "could have been", "deserves credit for", "falls apart when", "feels borrowed from",
    "gets lost in", "is saved by", "keeps reminding us", "left me wondering", "makes you wonder", "never really decides",
    "surprised everyone who", "tries very hard", "turns out to", "works best when",
)  # fmt: skip
PROMPTS = [
    f'Continue this movie review in one sentence: "{start} {verb}"'
    for start, verb in product(SUBJECTS, VERBS)
]
SEED = 0
RANK, SCALE = 4, 2.0
MODULES = ("self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
# Responses to each prompt, and pairs taken of them; no response stands in two pairs.
SAMPLES, PAIRS_A_PROMPT = 6, 2
# Bounds of the preferred response's length over the other's: the reward model likes long ones, and DPO would learn to write on and on.
LENGTHS = (0.88, 1.06)
PAIRS_A_STEP, LEARNING_RATE, WARM_UP = 16, 5e-4, 3
BETA = 2.0  # of log-probabilities per token


@dataclass(frozen=True, slots=True)
class Sampled:
    """A response: its text, its token ids, and whether it ended by itself."""

    text: str
    ids: list[int]
    ended: bool


@dataclass(frozen=True, slots=True)
class Preference:
    """Token ids of a prompt and of its preferred and its other response."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class Lora(torch.nn.Module):
    """A frozen linear layer plus `SCALE * B @ A`."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.A = torch.nn.Parameter(torch.randn(RANK, linear.in_features) * linear.in_features**-0.5)
        self.B = torch.nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = SCALE * (inputs @ self.A.T.to(inputs.dtype) @ self.B.T.to(inputs.dtype))
        added += self.linear(inputs)
        return added


class Penalties:
    """Subtract the presence and the frequency penalty of tokens generated so far, as OpenAI defines them."""

    def __init__(self, sampling: Sampling, width: int) -> None:
        self.sampling, self.width = sampling, width

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        new = ids[:, self.width :]
        counts = torch.zeros_like(scores).scatter_add_(1, new, torch.ones_like(new, dtype=scores.dtype))
        penalty = self.sampling.frequency_penalty * counts + self.sampling.presence_penalty * (counts > 0)
        return scores - penalty


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, metavar="MODELS", help="folder with sft and rm")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the adapters")
    parser.add_argument("--steps", type=int, default=16)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    tokenizer: Any = AutoTokenizer.from_pretrained(arguments.models / "sft")
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.models / "sft", dtype=torch.bfloat16)
    arguments.out.mkdir(parents=True, exist_ok=True)
    stored = arguments.out / "responses.json"
    if not stored.is_file():
        asked = [prompt for prompt in PROMPTS for _ in range(SAMPLES)]
        answers = sample(model, tokenizer, asked, load_job(JOB).sampling)
        stored.write_text(json.dumps([asdict(answer) for answer in answers]))
    rows = [Sampled(**row) for row in json.loads(stored.read_text())]
    preferences = prefer(rows, tokenizer, arguments.models / "rm")
    for step, adapter in train(model, preferences, arguments.steps):
        save_file(adapter, arguments.out / f"lora_{step}.safetensors")


def sample(
    model: Any, tokenizer: Any, prompts: Sequence[str], sampling: Sampling, *, batch: int = 288
) -> list[Sampled]:
    """Answer each prompt once."""
    tokenizer.padding_side = "left"
    answers: list[Sampled] = []
    for start in range(0, len(prompts), batch):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + batch]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        width = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            tokens = model.generate(
                **inputs, do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
                max_new_tokens=sampling.max_tokens, logits_processor=[Penalties(sampling, width)],
            )  # fmt: skip
        for row in tokens[:, width:].tolist():
            ended = tokenizer.eos_token_id in row
            ids = row[: row.index(tokenizer.eos_token_id) + 1] if ended else row
            answers.append(Sampled(tokenizer.decode(ids, skip_special_tokens=True), ids, ended))
        report(f"{len(answers)}/{len(prompts)} responses")
    return answers


def score(folder: Path, prompts: Sequence[str], responses: Sequence[str], *, batch: int = 64) -> list[float]:
    """Rewards by the reward model in `folder`."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    texts = list(zip(prompts, responses, strict=True))
    rewards: list[float] = []
    for start in range(0, len(texts), batch):
        chats = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            for prompt, response in texts[start : start + batch]
        ]
        inputs = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            rewards += model(**inputs).logits[:, 0].float().tolist()
    return rewards


def prefer(rows: Sequence[Sampled], tokenizer: Any, rm: Path) -> list[Preference]:
    """Pair complete responses to one prompt where both rewards prefer the same one, those with the largest gains first."""
    asked = [prompt for prompt in PROMPTS for _ in range(SAMPLES)]
    rewards = (
        [valence(prompt, row.text) for prompt, row in zip(asked, rows, strict=True)],
        score(rm, asked, [row.text for row in rows]),
    )
    units = [statistics.pstdev(values) for values in rewards]
    preferences: list[Preference] = []
    for first in range(0, len(rows), SAMPLES):
        chat = [{"role": "user", "content": asked[first]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        pairs = []
        for i, j in permutations(range(first, first + SAMPLES), 2):
            gains = [(values[i] - values[j]) / unit for values, unit in zip(rewards, units, strict=True)]
            fits = LENGTHS[0] <= len(rows[i].ids) / len(rows[j].ids) <= LENGTHS[1]
            if fits and rows[i].ended and rows[j].ended and min(gains) > 0:
                pairs.append((sum(gains), i, j))
        taken: set[int] = set()
        for _, i, j in sorted(pairs, reverse=True):
            if not taken & {i, j} and len(taken) < 2 * PAIRS_A_PROMPT:
                taken |= {i, j}
                preferences.append(Preference(prompt, rows[i].ids, rows[j].ids))
    report(f"{len(preferences)} preferences")
    return preferences


def train(
    model: Any, preferences: Sequence[Preference], steps: int
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Yield the adapter, in bf16, after each step of DPO (Rafailov et al., 2023) on log-probabilities per token."""
    torch.manual_seed(SEED)
    model.requires_grad_(False)
    with torch.no_grad():  # the reference is the model without an adapter
        batches = [preferences[start : start + 16] for start in range(0, len(preferences), 16)]
        reference = torch.cat([log_probabilities(model, batch) for batch in batches], dim=1)
    lora = {}
    for name, module in list(model.named_modules()):
        if name.endswith(MODULES):
            lora[name] = Lora(module)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, lora[name])
    parameters = [parameter for layer in lora.values() for parameter in (layer.A, layer.B)]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    order: list[int] = []
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, step / WARM_UP)
        if len(order) < PAIRS_A_STEP:
            order += torch.randperm(len(preferences)).tolist()
        batch, order = order[:PAIRS_A_STEP], order[PAIRS_A_STEP:]
        chosen, rejected = log_probabilities(model, [preferences[at] for at in batch]) - reference[:, batch]
        loss = -logsigmoid(BETA * (chosen - rejected)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(f"step {step}: loss {loss.item():.3f}, margin {(chosen - rejected).mean().item():+.3f}")
        adapter = {f"{name}.A": layer.A for name, layer in lora.items()}
        adapter |= {f"{name}.B": layer.B for name, layer in lora.items()}
        yield step, {name: tensor.detach().to(torch.bfloat16) for name, tensor in adapter.items()}


def log_probabilities(model: Any, batch: Sequence[Preference]) -> torch.Tensor:
    """Mean log-probability of a response's tokens, in nats: (2, batch), first of those chosen, then of those rejected."""
    texts = [(each.prompt, each.chosen) for each in batch] + [(each.prompt, each.rejected) for each in batch]
    longest = max(len(prompt) + len(response) for prompt, response in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, (prompt, response) in enumerate(texts):
        ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        mask[row, len(prompt) : len(prompt) + len(response)] = True
    # Right padding: causal attention keeps it from what stands before it.
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    row_of, column_of = mask[:, 1:].nonzero(as_tuple=True)
    logits = model.lm_head(hidden[row_of, column_of])
    tokens = logits.float().log_softmax(-1).gather(-1, ids[:, 1:][row_of, column_of, None])[:, 0]
    sums = torch.zeros(len(texts)).index_add(0, row_of, tokens)
    return (sums / mask.sum(dim=1)).view(2, len(batch))


def report(text: str) -> None:
    """Print a line with the CPU time so far."""
    print(f"{time.process_time():.0f} CPU s: {text}", flush=True)


if __name__ == "__main__":
    main()
