"""Evidence against retraining: oracles, gaps, loss barriers."""
