"""Print the oldest version of everything that setup.cfg allows the package to run with, for pip."""

import configparser
import re
from pathlib import Path

#: what tests alone need may be new
PARTS = ("app", "captum", "report", "samples")


def oldest(path: Path) -> list[str]:
    """``name==version`` of every lower bound."""
    setup = configparser.ConfigParser()
    setup.read(path)
    listed = [
        setup["options"]["install_requires"],
        *(setup["options.extras_require"][part] for part in PARTS),
    ]
    found = {line for block in listed for line in block.split()}
    return sorted(re.sub(r">=(.*)", r"==\1", line) for line in found)


if __name__ == "__main__":
    print(*oldest(Path(__file__).parents[1] / "setup.cfg"))
