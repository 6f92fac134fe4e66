"""How a finished model is spread over processes, applied from outside in one fixed order."""
