"""Weights in and out: `python -m llama.convert SRC DST --to hf|native|meta|gguf`.

A run, a checkpoint, or a folder of Hugging Face's or Meta's goes in; one of these or a GGUF file
comes out, checked, or nothing at all. Weights are those of paper §2.2 under other names.
"""
