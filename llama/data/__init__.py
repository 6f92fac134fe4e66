"""Documents in, batches out: token shards, the exact mixture and the order of a run (§2.1).

``tokenize`` and ``shards`` make and read the files, ``order`` says which window every step draws,
``mixture`` and ``ledger`` answer questions about it, ``loader`` (the only importer of torch) reads.
"""
