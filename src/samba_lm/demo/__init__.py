"""The main job: real text, four small twins, the paper's claim measured on this machine, a report."""
