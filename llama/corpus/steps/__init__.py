"""Steps that recipes share: generator functions from documents to documents."""
