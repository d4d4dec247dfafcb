"""Small shared modules: linear, norm, MLP, rotary positions, initialisation."""
