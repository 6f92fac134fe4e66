"""The model card of an export: README.md with data, tokens and licence.

In: a source, with what its checkpoint records of the run; out: Markdown. The table of sources is
Table 1 of the paper for this run: shares of the mixture, and tokens that were trained on.
"""

from __future__ import annotations

from typing import Any

from llama.cli import show_count
from llama.convert.source import Source
from llama.data import order
from tokenizer.tokenizer import Tokenizer

UNKNOWN_LICENSE = "other"


def render(source: Source, tokenizer: Tokenizer, name: str, license: str | None) -> str:
    """The card of a model called `name`."""
    cfg = source.cfg
    sections = [
        "---",
        f"license: {license or UNKNOWN_LICENSE}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [llama]",
        "---",
        "",
        f"# {name}",
        "",
        f"A LLaMA (arXiv 2302.13971) of {show_count(source.n_parameters)} parameters: a language "
        "model trained on plain text. It continues text and was not taught to follow instructions.",
        "",
        *_table(
            ("parameters", f"{source.n_parameters:,}"),
            ("layers", cfg.n_layers),
            ("width", cfg.dim),
            ("heads", f"{cfg.n_heads}, {cfg.kv_heads} for keys and values"),
            ("feed-forward width", cfg.hidden_dim),
            ("context", f"{source.context} tokens"),
            ("weights", str(source.dtype).removeprefix("torch.")),
        ),
        "",
        "## Data",
        "",
        *_data(source),
        "",
        "## Tokens",
        "",
        f"SentencePiece BPE of {tokenizer.vocab_size:,} pieces (`tokenizer.model`, sha256 "
        f"`{tokenizer.sha256}`). `tokenizer.json` gives the same ids. In training every document "
        f"began with BOS ({tokenizer.bos_id}) and ended with EOS ({tokenizer.eos_id}), so "
        "tokenizers put BOS in front. Control pieces written in a text stay text: load with "
        "`split_special_tokens=False` to change that.",
        "",
        "## Licence",
        "",
        _license(license),
        "",
    ]
    return "\n".join(sections)


def _table(*rows: tuple[str, object]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]


def _data(source: Source) -> list[str]:
    """What it was trained on, as far as the source knows."""
    state: dict[str, Any] = source.state
    if not state.get("segments"):
        origin = state.get("converted_from", {"format": source.format})["format"]
        return [f"Converted from weights in the format {origin}, which does not record the data."]
    saved, step = state["config"], state["step"]
    run = order.Order(saved["seed"], order.from_json(state["segments"]))
    tokens = run.source_tokens(step)
    total = sum(tokens.values())
    mixture = saved["data"]["mixture"]
    rows = [
        f"| {name} | {mixture.get(name, 0):.2%} | {count:,} |"
        for name, count in sorted(tokens.items(), key=lambda item: -item[1])
    ]
    train, optim = saved["train"], saved["optim"]
    return [
        f"{total:,} tokens in {step:,} steps of {train['batch_tokens']:,}, in windows of "
        f"{saved['data']['seq_len']:,}; {optim['name']}, learning rate up to {optim['lr']}.",
        "",
        "| source | share of the mixture | tokens trained on |",
        "|---|---:|---:|",
        *rows,
    ]


def _license(license: str | None) -> str:
    if license:
        return f"The weights are published under: {license}."
    return (
        "None was given when this was written (`--license`). The weights may be used as far as "
        "their author and the licences of the sources above allow."
    )
