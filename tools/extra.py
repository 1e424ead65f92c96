"""Print the requirements of extras in pyproject.toml, one a line: extra.py NAME..."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def main() -> int:
    project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]
    for name in sys.argv[1:]:
        print("\n".join(project["optional-dependencies"][name]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
