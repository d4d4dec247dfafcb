"""Contexts: what a model has read, kept in a file whose size and loading do not depend on how much it was."""
