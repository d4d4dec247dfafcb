"""lm_eval's own command with our model class in it: ``python -m samba_lm.eval.harness run --model samba_lm ...``."""

from __future__ import annotations


def main() -> None:
    """Run ``lm_eval`` with this process's arguments."""
    from lm_eval.__main__ import cli_evaluate

    import samba_lm.eval.harness.model  # noqa: F401 - registers the class

    cli_evaluate()


if __name__ == "__main__":
    main()
