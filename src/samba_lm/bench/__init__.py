"""Timings. Each checks parity first, and prints no speed if that fails."""
