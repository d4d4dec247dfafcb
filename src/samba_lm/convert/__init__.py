"""Weights from and to other code: the paper's reference code, and Hugging Face `transformers`."""
