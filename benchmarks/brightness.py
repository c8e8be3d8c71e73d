"""Labels by which features do not cluster: whether a photograph is brighter than the median.

python benchmarks/brightness.py --data_dir /datasets/flowers --out BRIGHT
python benchmarks/study.py --data_dir BRIGHT --table brightness

A linear head on the features of a backbone can learn these labels, but the images of one of them are of all kinds. The
folder that is made holds links, in a subfolder for each label; of copies of an image there is one.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png")


def brightness(file: Path) -> float:
    """The mean of an image's grey levels, 0 to 255."""
    with Image.open(file) as image:
        return float(np.asarray(image.convert("L").resize((64, 64))).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    files = sorted(path for path in options.data_dir.rglob("*") if path.suffix.lower() in SUFFIXES)
    distinct = {hashlib.sha256(file.read_bytes()).digest(): file for file in reversed(files)}.values()
    levels = {file: brightness(file) for file in distinct}
    median = np.median([*levels.values()])
    for file, level in levels.items():
        name = "__".join(file.relative_to(options.data_dir).parts)
        link = options.out / ("bright" if level > median else "dark") / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.resolve())


if __name__ == "__main__":
    main()
