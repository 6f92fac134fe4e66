"""What a run did, as one page and pictures: `python -m llama.report`."""
