"""LLaMA pretraining from raw text to a trained, measured and exported model (arXiv 2302.13971)."""
