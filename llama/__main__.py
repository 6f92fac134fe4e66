r"""`python -m llama`: every command in pipeline order, one line and one example each.

python -m llama.doctor          what this machine lacks, and what to do
    python -m llama.doctor
python -m llama.corpus run      raw text to documents (.jsonl.zst)
    python -m llama.corpus run --config configs/corpus/plain.yaml \
        --input texts --output data/mine/documents/mine
python -m llama.corpus train_models
                                models of languages and of pages worth keeping
    python -m llama.corpus train_models --wikipedia data/clean/wikipedia \
        --crawl data/crawl --output data/models
python -m llama.corpus dedup    documents that occur more than once, once
    python -m llama.corpus dedup --step exact \
        --input data/mine/documents/mine --output data/once
python -m llama.corpus all      every source of raw dumps, then across them
    python -m llama.corpus all --input raw --output data/clean
python -m llama.corpus report   one page about documents, and their licences
    python -m llama.corpus report data/clean --output data/clean/report.html
python -m llama.corpus explain  what became of one document, step by step
    python -m llama.corpus explain data/clean enwiki:12
python -m tokenizer.train       documents to a SentencePiece tokenizer
    python -m tokenizer.train --config configs/tokenizer.yaml \
        --input data/mine/documents --output data/mine/tokenizer
python -m llama.data.tokenize   documents to token shards (.bin, .idx)
    python -m llama.data.tokenize --input data/mine/documents \
        --tokenizer data/mine/tokenizer --output data/mine/tokens
python -m llama.data.shards     check shards, or adopt Megatron's
    python -m llama.data.shards check data/mine/tokens
python -m llama.data.mixture    tokens and epochs per source of a run
    python -m llama.data.mixture --config configs/quickstart.yaml
python -m llama.plan            memory, speed and cost of a run on a cluster
    python -m llama.plan --config configs/llama_65b.yaml \
        --gpus 2048 --gpu a100-80g
torchrun train.py               shards to checkpoints; the same command resumes
    torchrun --nproc-per-node 2 train.py --config configs/quickstart.yaml
python -m llama.data.ledger     documents of a step, steps of a document
    python -m llama.data.ledger runs/quickstart --step 10
python -m llama.verify          train steps of a run again and compare the bits
    python -m llama.verify runs/quickstart
python -m llama.report          one page about a run, or several compared
    python -m llama.report runs/quickstart
python -m llama.trace           where the time of recorded steps went
    python -m llama.trace runs/quickstart
python -m llama.convert         weights to and from Hugging Face, Meta, GGUF
    python -m llama.convert runs/quickstart exports/quickstart --to hf
python -m llama.generate        text from a checkpoint
    python -m llama.generate runs/quickstart --prompt "def main("
python -m kernels.check         compile every GPU kernel, without a GPU
    python -m kernels.check
python -m kernels.tune          measure tiles of the attention on this GPU
    python -m kernels.tune
"""

# README's block of commands, tested there: at most 80 columns, examples ready to paste
LISTING = str(__doc__).partition("\n\n")[2].rstrip()

if __name__ == "__main__":
    print(LISTING)
