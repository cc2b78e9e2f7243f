"""The command line of the training tool: puts its parts together."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from tools.demo_model.checking import Case, Choice, choose, report
from tools.demo_model.examples import Codec, Mix, RowSource, show
from tools.demo_model.export import rounded_model, write_exl2, write_fp16
from tools.demo_model.model import Llama, Shape
from tools.demo_model.squad import Corpus, closest_rival, read_squad, split_articles
from tools.demo_model.start import WORD, company_vectors, embeddings, initialise, token_facts
from tools.demo_model.training import Plan, Trainer, Worker
from tools.demo_model.vocabulary import EOS, train_vocabulary

SETTINGS = {"quote_unit": "sentence", "k": 1, "max_claims": 1, "claim_text": "quote"}


def build_tokenizer(corpus: Corpus, train: Sequence[int], *, size: int) -> Tokenizer:
    """The vocabulary of the training passages."""
    passages = [corpus.passages[n] for n in train]
    replies = [(q.text, p.sentences[q.sentence], q.answer) for p in passages for q in p.questions]
    return train_vocabulary([p.text for p in passages] + [q for q, _, _ in replies], replies, size=size)


def held_out_cases(corpus: Corpus, aside: Sequence[int], *, count: int, n_shown: int, seed: int) -> list[Case]:
    """Questions of articles never trained on; with `n_shown` passages, one of them right. A fifth have no answer."""
    rng = random.Random(seed)
    cases = []
    numbers = [n for n in aside if corpus.passages[n].questions and len(corpus.passages[n].text) < 1400]
    for position in range(count):
        number = rng.choice(numbers)
        question = rng.choice(corpus.passages[number].questions)
        chosen = [number]
        while len(chosen) < n_shown + 1:
            rival = closest_rival(corpus, number, question.text, rng)
            if len(corpus.by_article[corpus.passages[number].article]) <= n_shown or rng.random() < 0.02:
                rival = rng.randrange(len(corpus.passages))
            if rival not in chosen:
                chosen.append(rival)
        unanswerable = position % 5 == 4
        chosen = chosen[1:] if unanswerable else chosen[:-1]
        shown = show(rng, [corpus.passages[n] for n in chosen])
        best = next(n for n, s in enumerate(shown) if s.passage is corpus.passages[chosen[0]])
        cases.append(Case(question.text, tuple(shown), () if unanswerable else (question.answer,), best))
    return cases


def prepare_model(tokenizer: Tokenizer, corpus: Corpus, train: Sequence[int]) -> Llama:
    """The model before training."""
    codec = Codec(tokenizer)
    passages = [codec.encode(corpus.passages[n].text) for n in train]
    questions = [codec.encode(q.text) for n in train for q in corpus.passages[n].questions]
    facts = token_facts(tokenizer, [*passages, *questions * 3])
    company = company_vectors(passages, tokenizer.get_vocab_size(), WORD.stop - WORD.start)
    model = Llama(Shape(vocab_size=tokenizer.get_vocab_size()))
    initialise(model, embeddings(facts, company))
    return model


def schedule(share: float) -> Mix:
    """Made-up questions and single passages first, real questions and more passages later."""
    if share < 0.3:
        return Mix(cloze_share=0.5, shown_counts=(0.95, 0.05, 0.0), decline_share=0.12, whole_share=0.05)
    if share < 0.6:
        return Mix(cloze_share=0.3, shown_counts=(0.8, 0.2, 0.0), decline_share=0.15, whole_share=0.15)
    return Mix(cloze_share=0.1, shown_counts=(0.75, 0.2, 0.05), decline_share=0.18, whole_share=0.35)


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description="Train the demo model on SQuAD.")
    parser.add_argument("--squad", type=Path, required=True, help="train-v1.1.json.xz")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the finished models")
    parser.add_argument("--minutes", type=float, default=30.0, help="processor time of a worker")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; as many as cores")
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens")
    parser.add_argument("--bits", type=float, default=6.0, help="bits per weight of the EXL2 form")
    parser.add_argument("--held-out", type=int, default=20, help="articles to check on")
    parser.add_argument("--cases", type=int, default=500, help="questions to check on")
    parser.add_argument("--plan", type=json.loads, default={}, help="JSON of plan values that differ from the default")
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    corpus = read_squad(args.squad)
    train, aside = split_articles(corpus, held_out=args.held_out, seed=0)
    codec, model = prepare(args, corpus, train)
    with workers(args) as worker:
        source = RowSource(corpus, train, codec, seed=worker.rank)
        plan = Plan(minutes=args.minutes, **args.plan)
        pad = codec.special(EOS)
        trainer = Trainer(model, source, plan, pad=pad, directory=args.out, schedule=schedule, worker=worker)
        trainer.resume()
        one_shown = held_out_cases(corpus, aside, count=args.cases, n_shown=1, seed=1)
        trainer.run(on_check=lambda: _check(corpus, codec, model, one_shown), check_seconds=120)
    if worker.rank == 0:
        finish(args, corpus, codec, model, aside)


def finish(args: argparse.Namespace, corpus: Corpus, codec: Codec, model: Llama, aside: Sequence[int]) -> None:
    """Write both forms of the trained model, and compare them on the articles held out."""
    fp16, exl2 = args.out / "fp16", args.out / "exl2"
    for directory in (fp16, exl2):
        shutil.rmtree(directory, ignore_errors=True)
    write_fp16(model, codec.tokenizer, fp16, settings=SETTINGS)
    converted = write_exl2(fp16, exl2, bits=args.bits, head_bits=8)
    shutil.copyfile(args.out / "loss_curve.json", exl2 / "loss_curve.json")
    print(f"{converted.n_bytes / 1e6:.1f} MB at {converted.bits_per_weight:.2f} bits per weight in {exl2}", flush=True)
    rounded = rounded_model(model, exl2)
    for n_shown in (1, 2, 3):
        cases = held_out_cases(corpus, aside, count=args.cases, n_shown=n_shown, seed=n_shown)
        before = _check(corpus, codec, model, cases, name="float32")
        after = _check(corpus, codec, rounded, cases, name=f"EXL2 {args.bits:g}")
        same = sum(a.quote == b.quote for a, b in zip(before, after, strict=True))
        print(f"  same sentence in {same} of {len(cases)}", flush=True)


def _check(
    corpus: Corpus, codec: Codec, model: Llama, cases: Sequence[Case], *, name: str = "held out"
) -> list[Choice]:
    choices = choose(model, codec, cases)
    figures = "  ".join(f"{key} {value:.3f}" for key, value in report(corpus, cases, choices).items())
    print(f"  {name}, {len(cases[0].shown)} shown: {figures}", flush=True)
    return choices


def prepare(args: argparse.Namespace, corpus: Corpus, train: Sequence[int]) -> tuple[Codec, Llama]:
    """The vocabulary and the untrained model; made by the first worker, read by the others."""
    path, start = args.out / "tokenizer.json", args.out / "start.pt"
    if args.rank == 0 and not start.is_file():
        build_tokenizer(corpus, train, size=args.vocabulary).save(str(path))
        model = prepare_model(Tokenizer.from_file(str(path)), corpus, train)
        torch.save(model.state_dict(), start.with_suffix(".tmp"))
        start.with_suffix(".tmp").replace(start)
    codec = Codec(Tokenizer.from_file(str(path)))
    model = Llama(Shape(vocab_size=codec.tokenizer.get_vocab_size()))
    model.load_state_dict(torch.load(start))
    return codec, model


@contextmanager
def workers(args: argparse.Namespace) -> Iterator[Worker]:
    """Start the other workers, if this is the first one, and meet with them."""
    worker = Worker(args.rank, args.workers)
    if worker.count == 1:
        yield worker
        return
    meeting = args.out / "meeting"
    others = []
    if worker.rank == 0:
        meeting.unlink(missing_ok=True)
        command = [sys.executable, *sys.argv]
        others = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(1, worker.count)]
    dist.init_process_group("gloo", init_method=meeting.absolute().as_uri(), rank=worker.rank, world_size=worker.count)
    try:
        yield worker
    finally:
        dist.destroy_process_group()
        for other in others:
            other.wait()
