"""Small shared modules: linear, norm, initialisation."""
