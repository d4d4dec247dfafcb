"""Text to token shards (``prepare``, ``sources``), their format (``shards``) and batches from them (``loader``).

Only ``loader`` imports torch; nothing here knows of a model.
"""
