"""Weights in and out: runs, Hugging Face's and Meta's folders, GGUF; the names of paper §2.2."""
