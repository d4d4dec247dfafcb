"""Tasks of lm-evaluation-harness: our models as its model class, its tasks from a folder of files, and HumanEval."""
