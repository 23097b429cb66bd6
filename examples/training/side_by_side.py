"""The curves of `dagger.py` and `randomised.py` beside each other in one figure, after both have run.

python examples/training/side_by_side.py
python examples/training/side_by_side.py outputs/dagger/curves.json outputs/randomised/inside_curves.json learned.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from plots import plot_side_by_side
from studies import by_data, read_curves


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the curves of dagger.py and randomised.py beside each other.")
    parser.add_argument("dagger", type=Path, nargs="?", default=Path("outputs/dagger/curves.json"))
    parser.add_argument("randomised", type=Path, nargs="?", default=Path("outputs/randomised/inside_curves.json"))
    parser.add_argument("out", type=Path, nargs="?", default=Path("outputs/side_by_side.png"))
    options = parser.parse_args()
    panels = {
        "DAgger: a moving goal, the learner acts": by_data(read_curves(options.dagger)),
        "Domain randomisation: unseen parameters": by_data(read_curves(options.randomised)),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    plot_side_by_side(panels, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
