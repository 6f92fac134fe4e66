"""What is learnt from the user's own text: languages, references of Wikipedia, n-gram models."""
