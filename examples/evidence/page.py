"""The outcomes as Markdown, so that no figure is typed by hand."""

from __future__ import annotations

import re
from pathlib import Path

from claims.base import Claim
from stats import Rows

HEAD = """\
| measured | expected | mean (95 % interval) | seeds | outcome |
| --- | --- | --- | ---: | --- |"""


def outcome(claim: Claim, rows: Rows) -> str:
    """The claim in the words that were written first, and a line for each of its checks."""
    checks = "\n".join(check.row(rows) for check in claim.checks)
    return f"**Claim.** {claim.says}\n\n{HEAD}\n{checks}"


def fill(path: Path, outcomes: dict[str, str]) -> None:
    """Replaces what is between ``<!-- outcome NAME -->`` and ``<!-- end -->``."""
    text = path.read_text()
    for name, found in outcomes.items():
        block = re.compile(f"(<!-- outcome {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        text = block.sub(lambda match, found=found: f"{match[1]}{found}{match[2]}", text)
    path.write_text(text)
