"""Operations: one folder each, with the definition (`reference.py`) and faster paths that must equal it."""
