"""Check that every relative link in the Markdown files leads to a file that exists.

python tools/check_docs.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
SKIPPED = {".venv", "build", "node_modules"}


def broken_links(root: Path) -> list[str]:
    """One line for every link whose target is not there."""
    broken = []
    for page in sorted(root.rglob("*.md")):
        if SKIPPED & set(page.relative_to(root).parts):
            continue
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            if "://" in target or target.startswith("mailto:"):
                continue
            if not (page.parent / target).exists():
                broken.append(f"{page.relative_to(root)}: {target}")
    return broken


def main() -> int:
    """Print what is broken; 1 if anything is."""
    broken = broken_links(ROOT)
    print("\n".join(broken) if broken else "every relative link leads somewhere")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
