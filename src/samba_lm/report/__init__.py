"""Pages of results: what `samba-lm eval` and `samba-lm train` wrote, as one HTML file that needs nothing else."""
