"""What the documentation says that can be compared with the code."""

from __future__ import annotations

import re
from pathlib import Path

import anyflow
from anyflow.families.__main__ import document

ROOT = Path(__file__).parent.parent


def test_the_table_of_families_is_that_of_the_specs() -> None:
    assert (ROOT / "docs/families.md").read_text() == document(), "python -m anyflow.families > docs/families.md"


def test_every_family_is_in_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", document(), flags=re.MULTILINE)
    assert rows == sorted(rows) and len(rows) == 63
    assert set(rows) <= set(anyflow.families())
