"""``samba-lm report``: one page of what a folder's results say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from tyro.conf import Positional

from samba_lm.cli.output import output_file
from samba_lm.cli.parse import parse
from samba_lm.files import write_text


@dataclass(frozen=True)
class Report:
    """Write one HTML page that compares the models of all results in a folder and the folders in it: files that
    `samba-lm eval ... --json FILE` wrote, metrics of trainings, records of studies. The page needs nothing else: send
    it, print it, open it anywhere."""

    folder: Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
    """Folder with results."""
    out: Path | None = None
    """File to write; by default report.html in DIR."""


def main(argv: list[str]) -> None:
    """Run the command."""
    options = parse(Report, argv, prog="samba-lm report")
    from samba_lm.report.found import check_folder
    from samba_lm.report.results import results_page

    check_folder(options.folder)
    out = output_file(options.out or options.folder / "report.html", "--out", "report.html")
    text, found = results_page(options.folder)
    write_text(out, text)
    errors = Console(stderr=True)
    for problem in found.problems:
        errors.print(f"Left out: {problem.path} {problem.why}.", markup=False, highlight=False)
    Console().print(str(out), markup=False, highlight=False)
