"""`python -m llama`: every command in pipeline order, one line and one example each."""

import textwrap

from llama import cli

COMMANDS = [
    (
        "python -m llama.doctor",
        "what this machine lacks, and what to do",
        "",
    ),
    (
        "python -m llama.corpus run",
        "raw text to documents (.jsonl.zst)",
        "--config configs/corpus/plain.yaml --input texts --output data/mine/documents/mine",
    ),
    (
        "python -m llama.corpus dedup",
        "documents that occur more than once, once",
        "--step exact --input data/mine/documents/mine --output data/once",
    ),
    (
        "python -m llama.corpus all",
        "every source of raw dumps, then across them",
        "--input raw --output data/clean",
    ),
    (
        "python -m llama.corpus report",
        "one page about documents, and their licences",
        "data/clean --output data/clean/report.html",
    ),
    (
        "python -m llama.corpus explain",
        "what became of one document, step by step",
        "data/clean enwiki:12",
    ),
    (
        "python -m tokenizer.train",
        "documents to a SentencePiece tokenizer",
        "--config configs/tokenizer.yaml --input data/mine/documents --output data/mine/tokenizer",
    ),
    (
        "python -m llama.data.tokenize",
        "documents to token shards (.bin, .idx)",
        "--input data/mine/documents --tokenizer data/mine/tokenizer --output data/mine/tokens",
    ),
    (
        "python -m llama.data.shards",
        "check shards, or adopt Megatron's",
        "check data/mine/tokens",
    ),
    (
        "python -m llama.data.mixture",
        "tokens and epochs per source of a run",
        "--config configs/quickstart.yaml",
    ),
    (
        "torchrun train.py",
        "shards to checkpoints; the same command resumes",
        "--nproc-per-node 2 train.py --config configs/quickstart.yaml",
    ),
    (
        "python -m llama.data.ledger",
        "documents of a step, steps of a document",
        "runs/quickstart --step 10",
    ),
    (
        "python -m llama.report",
        "one page about a run, or several compared",
        "runs/quickstart",
    ),
    (
        "python -m llama.convert",
        "weights to and from Hugging Face, Meta, GGUF",
        "runs/quickstart exports/quickstart --to hf",
    ),
    (
        "python -m llama.generate",
        "text from a checkpoint",
        'runs/quickstart --prompt "def main("',
    ),
    (
        "python -m kernels.check",
        "compile every GPU kernel, without a GPU",
        "",
    ),
    (
        "python -m kernels.tune",
        "measure tiles of the attention on this GPU",
        "",
    ),
]


def listing() -> str:
    """The table that README shows too: at most 80 columns, examples ready to paste."""
    lines = []
    for command, purpose, example in COMMANDS:
        start = "torchrun" if command.startswith("torchrun") else command
        wrapped = textwrap.wrap(
            f"{start} {example}",
            width=76,
            initial_indent="    ",
            subsequent_indent="        ",
            break_on_hyphens=False,
        )
        lines += [f"{command:<32}{purpose}", " \\\n".join(wrapped)]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(lambda argv: print(listing()))
