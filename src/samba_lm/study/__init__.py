"""Many trainings and what is measured of them, from recipes: planned, run unattended, put into tables."""
