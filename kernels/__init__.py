"""The operations a LLaMA is made of: plain PyTorch in `reference.py`, faster ones beside it."""
