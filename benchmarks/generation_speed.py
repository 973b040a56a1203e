"""Rows per second of generation for evaluation: hfkit against a plain loop over `model.generate`.

    python benchmarks/generation_speed.py          # writes benchmarks/results/generation_speed.json
    python benchmarks/generation_speed.py --model runs/finetune --data runs/functions

The plain loop takes the prompts in the order of the data, in batches of the same size, padded on the left by the
tokenizer. In one process and in turn, several times over, run the plain loop; the same on prompts sorted by length;
hfkit's loop, batch after batch, each until its last row ends; and hfkit's, where a row that ends gives its place to
the next. So the ratio splits into what sorting, the loop and refilling are worth.

Without a model, one of the default recipe's size learns in a minute to answer questions of two kinds. Replies are of
very unlike length (log-normal, sigma 1) after prompts of 8 to 80 tokens. Summaries are short and much alike (sigma
0.34, as those of the recipe for functions) after prompts of 40 to 190 tokens, so that most of the time goes into
reading prompts, which no loop can spare.

Greedy decoding must give the same texts. Where one differs, the gap between the two best logits at the first token
that differs tells a tie from an error: rounding differs with the shape of a batch, in `model.generate` as well.
"""

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hfkit.artifacts import manifest
from hfkit.data import corpus
from hfkit.data.rows.packing import IGNORED
from hfkit.data.tasks import task_in
from hfkit.data.tokenizer import load_tokenizer
from hfkit.inference import decoding, generation
from hfkit.inference.batches import padded
from hfkit.model import HfkitConfig, HfkitForCausalLM
from hfkit.model.loading import load_model
from hfkit.runtime.cores import usable_cores

ROOT = Path(__file__).parent.parent
VOCABULARY, STEPS, LEARNING_RATE = 4096, 300, 1e-2
QUESTIONS = 24  # of each kind
TIE = 1e-3  # logits


class Kind(NamedTuple):
    """Prompts of a number of tokens that is even over a range, and answers whose number of tokens is log-normal."""

    prompt: tuple[int, int]
    median: float
    sigma: float
    new_tokens: int

    def lengths(self) -> list[int]:
        """Of the answers to the questions: their quantiles."""
        quantiles = (statistics.NormalDist().inv_cdf((index + 0.5) / QUESTIONS) for index in range(QUESTIONS))
        return [min(self.new_tokens - 4, max(1, round(self.median * math.exp(self.sigma * z)))) for z in quantiles]


KINDS = {"replies": Kind((8, 80), 12, 1.0, 128), "summaries": Kind((40, 190), 13.4, 0.34, 64)}


class Toy:
    """A task to be learned: a prompt is filler, a question and an arrow, and each question has one answer."""

    def __init__(self) -> None:
        self.chance = random.Random(0)
        words = {"<pad>": 0, "<eos>": 1, "=>": 2} | {f"word{index}": index for index in range(3, VOCABULARY)}
        backend = Tokenizer(models.WordLevel(words))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
        unused = iter(self.chance.sample(range(3, VOCABULARY), VOCABULARY - 3))
        self.questions: dict[str, list[int]] = {}
        self.answers: dict[int, list[int]] = {}
        for name, kind in KINDS.items():
            self.questions[name] = [next(unused) for _ in range(QUESTIONS)]
            for question, length in zip(self.questions[name], kind.lengths(), strict=True):
                self.answers[question] = [next(unused) for _ in range(length)] + [1]

    def prompt(self, questions: list[int], shortest: int, longest: int) -> list[int]:
        filler = self.chance.choices(range(3, VOCABULARY), k=self.chance.randint(shortest, longest) - 2)
        return [*filler, self.chance.choice(questions), 2]

    def model(self, steps: int = STEPS) -> HfkitForCausalLM:
        """One that has learned the answers, after short prompts: rotary positions do not mind how long they are."""
        torch.manual_seed(0)
        model = HfkitForCausalLM(
            HfkitConfig(
                vocab_size=VOCABULARY,
                hidden_size=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=512,
                pad_token_id=0,
                eos_token_id=1,
            )
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1, (step + 1) / 20) * (1 - step / steps)
            prompts = [self.prompt(list(self.answers), 6, 16) for _ in range(16)]
            answers = [self.answers[each[-2]] for each in prompts]
            full = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
            labels = [[IGNORED] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)]
            loss = model(padded(full, 0)[0], labels=padded(labels, IGNORED)[0]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"the toy model's loss is {loss.item():.3f} nats a token")
        return model.eval()


def real(place: str, data: str, rows: int) -> tuple[Any, Any, list[list[int]]]:
    """A fine-tuned model, its tokenizer, and the prompts of its task's test split."""
    made = (manifest.read_json(Path(place)) or {}).get("recipe", {})
    task = task_in(made)
    tokenizer = load_tokenizer(place)
    room = made.get("sequence_length", 256) - generation.NEW_TOKENS
    prompts = [task.prompt_ids(row, tokenizer, room)[0] for row in list(corpus.rows(data, "test"))[:rows]]
    return load_model(place).eval(), tokenizer, [prompt for prompt in prompts if prompt]


class Runs:
    """The ways to answer the prompts; each gives the texts in the order of the prompts."""

    def __init__(self, model: Any, tokenizer: Any, prompts: list[list[int]], batch_size: int, new_tokens: int):
        self.model, self.tokenizer, self.prompts, self.batch_size = model, tokenizer, prompts, batch_size
        self.options = {"do_sample": False, "max_new_tokens": new_tokens}
        self.sorted = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))

    def plain(self, order: list[int] | None = None) -> list[str]:
        order = list(range(len(self.prompts))) if order is None else order
        texts: dict[int, str] = {}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = self.tokenizer.pad(
                {"input_ids": [self.prompts[index] for index in chosen]}, padding_side="left", return_tensors="pt"
            ).to(self.model.device)
            output = self.model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                pad_token_id=self.tokenizer.pad_token_id, **self.options,
            )  # fmt: skip
            new = output[:, batch["input_ids"].shape[1] :]
            texts |= zip(chosen, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True)
        return [texts[index] for index in range(len(self.prompts))]

    def plain_sorted(self) -> list[str]:
        return self.plain(self.sorted)

    def hfkit_batches(self) -> list[str]:
        decoder, rules = generation.plain_decoder(self.model), generation.rules_of(self.model, self.options)
        assert decoder is not None and rules is not None
        texts: dict[int, str] = {}
        for start in range(0, len(self.sorted), self.batch_size):
            chosen = self.sorted[start : start + self.batch_size]
            batch = [self.prompts[index] for index in chosen]
            for place, ids in decoding.decode(decoder, batch, rules, self.batch_size):
                texts[chosen[place]] = self.tokenizer.decode(ids, skip_special_tokens=True)
        return [texts[index] for index in range(len(self.prompts))]

    def hfkit(self) -> list[str]:
        return generation.generate(self.model, self.tokenizer, self.prompts, self.batch_size, self.options)

    def gap(self, prompt: list[int], text: str, other: str) -> float:
        """Between the two best logits where two texts part, computed for this row alone."""
        same = 0
        first, second = (self.tokenizer(each, add_special_tokens=False)["input_ids"] for each in (text, other))
        while same < min(len(first), len(second)) and first[same] == second[same]:
            same += 1
        ids = torch.tensor([prompt + first[:same]], device=self.model.device)
        best = self.model(input_ids=ids).logits[0, -1].float().topk(2).values
        return float(best[0] - best[1])


def seconds(work: Callable[[], list[str]]) -> tuple[float, list[str]]:
    begun = time.perf_counter()
    texts = work()
    return time.perf_counter() - begun, texts


@torch.no_grad()
def compare(runs: Runs, rounds: int) -> dict[str, Any]:
    """The medians of rows per second, the ratio and its parts, and the share of rows with the same text."""
    ways = {"plain": runs.plain, "sorted": runs.plain_sorted, "loop": runs.hfkit_batches, "hfkit": runs.hfkit}
    times: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, list[str]] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            spent, texts[name] = seconds(way)
            times[name].append(spent)
    median = {name: statistics.median(each) for name, each in times.items()}
    differ = [index for index, text in enumerate(texts["plain"]) if text != texts["hfkit"][index]]
    gaps = [runs.gap(runs.prompts[index], texts["plain"][index], texts["hfkit"][index]) for index in differ]
    count = len(runs.prompts)
    return {
        "rows_per_second": {name: round(count / each, 2) for name, each in median.items()},
        "ratio": round(median["plain"] / median["hfkit"], 3),
        "by_sorting": round(median["plain"] / median["sorted"], 3),
        "by_the_loop": round(median["sorted"] / median["loop"], 3),
        "by_refilling": round(median["loop"] / median["hfkit"], 3),
        "identical": 1 - len(differ) / count,
        "ties": sum(gap < TIE for gap in gaps),
        "gaps_where_texts_part": gaps,
        "seconds": times,
    }


def lengths(runs: Runs) -> dict[str, float]:
    """How long prompts and answers are, and the longest answer of a batch in the order of the data."""
    decoder, rules = generation.plain_decoder(runs.model), generation.rules_of(runs.model, runs.options)
    with torch.no_grad():
        found = dict(decoding.decode(decoder, runs.prompts, rules, runs.batch_size))
    new = [len(found[index]) for index in range(len(runs.prompts))]
    longest = [max(new[start : start + runs.batch_size]) for start in range(0, len(new), runs.batch_size)]
    return {
        "prompt_tokens": statistics.mean(map(len, runs.prompts)),
        "longest_prompt": max(map(len, runs.prompts)),
        "new_tokens": statistics.mean(new),
        "new_tokens_of_the_longest_of_a_batch": statistics.mean(longest),
        "cut_off": sum(each == runs.options["max_new_tokens"] for each in new) / len(new),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a fine-tuned causal model")
    parser.add_argument("--data", help="folder of prepared data for its task")
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    torch.set_num_threads(usable_cores())
    result: dict[str, Any] = {"batch_size": args.batch_size, "device": device.type, "torch": torch.__version__}
    result |= {"threads": torch.get_num_threads(), "rows": args.rows}
    if args.model:
        model, tokenizer, prompts = real(args.model, args.data, args.rows)
        found = {Path(args.model).name: (prompts, generation.NEW_TOKENS)}
    else:
        toy = Toy()
        model, tokenizer = toy.model(), toy.tokenizer
        found = {
            name: ([toy.prompt(toy.questions[name], *kind.prompt) for _ in range(args.rows)], kind.new_tokens)
            for name, kind in KINDS.items()
        }
    for name, (prompts, new_tokens) in found.items():
        runs = Runs(model.to(device), tokenizer, prompts, args.batch_size, new_tokens)
        result[name] = {"max_new_tokens": new_tokens, **lengths(runs), **compare(runs, args.rounds)}
        print(json.dumps({name: result[name]}, indent=2))
    path = ROOT / "benchmarks" / "results" / f"generation_speed{'_of_a_model' if args.model else ''}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
