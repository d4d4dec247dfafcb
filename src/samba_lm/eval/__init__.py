"""Measuring models: perplexity against context. Knows the model and the data, never the training."""
