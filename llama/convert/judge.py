"""What transformers makes of a folder; run by llama/convert/check.py in a process of its own.

In: a folder of Hugging Face's and a JSON file with token ids and texts. Out: a JSON file with the
texts' ids, and beside it the logits in float32. It runs outside this repository, and nothing of
ours is imported. Exit code 3: transformers cannot be imported.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

try:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ImportError as error:
    print(error, file=sys.stderr)
    sys.exit(3)


@torch.no_grad()
def main(folder: str, question: str, answer: str) -> None:
    """Load, run, write down."""
    asked = json.loads(Path(question).read_bytes())
    # a checkpoint in another type is widened, not rounded
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    logits = model(torch.tensor(asked["tokens"]), use_cache=False).logits.float()
    ids = []
    if asked["texts"]:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [tokenizer(text).input_ids for text in asked["texts"]]
    save_file({"logits": logits.contiguous()}, str(Path(answer).with_suffix(".safetensors")))
    Path(answer).write_text(json.dumps({"version": transformers.__version__, "ids": ids}))
