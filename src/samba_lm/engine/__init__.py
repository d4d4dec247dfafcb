"""Serving many sequences at once from one model: slots for their states, a scheduler, streams of text."""
