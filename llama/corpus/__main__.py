"""`python -m llama.corpus COMMAND`: raw text in, document shards out (paper §2.1).

usage: python -m llama.corpus COMMAND

  run --config configs/corpus/plain.yaml --input PATH ...
      --output data/SET/documents/SOURCE [--OPTION VALUE]
                             raw text to documents by one recipe
  train_models --wikipedia FOLDER ... --crawl FOLDER ... --output MODELS
                             languages, n-gram models and the classifier of
                             references, learnt from clean documents
  dedup --step exact --input data/SET/documents/SOURCE ... --output FOLDER
                             documents that occur in several places, once
  all --input RAW --output CLEAN [--models MODELS | none]
                             every source below RAW by its recipe; models and
                             the quality of pages; then across the sources
  report CLEAN -o report.html [--tokenizer FOLDER]
                             one page about it, and its bill of materials
  explain CLEAN ID           what happened to one document at each step

The first four take [--workers N] [--executor local|datatrove|slurm|ray]; each
lists its options with --help, `run --config FILE --help` those of a recipe.
"""

from importlib import import_module

from llama import cli
from llama.cli import UserError

# Modules with `main`, imported when they are called: what one needs, others need not have.
COMMANDS = {
    "run": "llama.corpus.recipes",
    "train_models": "llama.corpus.models.train",
    "dedup": "llama.corpus.dedup",
    "all": "llama.corpus.graph",
    "report": "llama.corpus.report",
    "explain": "llama.corpus.explain",
}
USAGE = str(__doc__).partition("\n\n")[2].rstrip()


def main(argv: list[str]) -> None:
    """Choose the command."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
    elif argv[0] in COMMANDS:
        import_module(COMMANDS[argv[0]]).main(argv[1:])
    else:
        raise UserError(f"unknown command {argv[0]!r}, expected one of {', '.join(COMMANDS)}")


if __name__ == "__main__":
    cli.run(main)
