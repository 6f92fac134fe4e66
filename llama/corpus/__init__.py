"""Raw text in, clean documents out (paper §2.1); imports no torch."""
