"""The page to label on, in a real browser: keys are pressed for real photographs, what it saves is read and trained on.

pip install playwright, and a Chromium (Debian: apt install chromium); then
python benchmarks/labelling.py --data_dir /datasets/flowers --n 25 --out labelling

Its classes are the names of the photographs' folders, which the program is not told: it labels as somebody would who
knows them. A class is typed in when it is first seen. Between two keys nothing is waited for. What is printed is how
long the keys took, how large the page was, what it asked of the network, and how many images the run that was trained
on the labels got right.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils

KEYS = "123456789abcdefghijklmnopqrstuvwxyz"
CURRENT = "document.querySelector('.card.current img').alt"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--n", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("labelling"))
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    parser.add_argument("rest", nargs="*", metavar="-- OPTION of MPL.py")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    run(options, "--name", "round1", "--select", options.n)
    page_file = options.out / "results/round1/to_label.html"
    print(f"page: {page_file.stat().st_size / 1e6:.1f} MB")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        for size, (width, height) in {"wide": (1280, 900), "phone": (375, 812)}.items():
            for scheme in ("light", "dark"):
                page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                page.goto(page_file.resolve().as_uri())
                page.screenshot(path=options.out / f"{size}-{scheme}.png")
                page.keyboard.press("*")
                page.screenshot(path=options.out / f"{size}-{scheme}-all.png")
                page.close()
        page = browser.new_page(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        asked: list[str] = []
        faults: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(page_file.resolve().as_uri())
        began = time.perf_counter()
        label(page, options.n)
        seconds = time.perf_counter() - began
        page.screenshot(path=options.out / "labelled.png")
        page.reload()
        assert f"all {options.n} labelled" in page.inner_text("#said"), "what was labelled is gone after a reload"
        with page.expect_download() as download:
            page.click("#save")
        table = options.out / download.value.suggested_filename
        download.value.save_as(table)
        browser.close()
    rows = utils.read_csv(table)
    wrong = [row["path"] for row in rows if row["label"] != row["path"].split("/")[0]]
    outside = [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
    print(
        f"{len(rows)} labels in {table}, {len(wrong)} wrong, keys: {seconds:.1f} s; asked of the network: "
        f"{outside or 'nothing'}"
    )
    run(options, "--name", "exp", "--labels", table.resolve())
    predicted = utils.read_csv(options.out / "results/exp/predictions.csv", split="unlabeled")
    right = sum(row["path"].split("/")[0] == row["predicted_label"] for row in predicted)
    print(
        f"trained on them: {right} of {len(predicted)} images without a label are right ({right / len(predicted):.1%})"
    )
    return int(bool(wrong or outside or faults or len(rows) != options.n))


def label(page: Page, n: int) -> None:
    """Give every image of the page its folder's name: by its key, or typed in; the first one at first wrongly."""
    known: list[str] = []
    for i in range(n):
        name = page.evaluate(CURRENT).split("/")[0]
        if i == 1:  # a slip, and back
            page.keyboard.press("1")
            page.keyboard.press("Backspace")
        if name in known:
            page.keyboard.press(KEYS[known.index(name)])
        else:
            page.keyboard.press("+")
            page.keyboard.type(name)
            page.keyboard.press("Enter")
            known.append(name)


def run(options: argparse.Namespace, *more: object) -> None:
    command = [sys.executable, ROOT / "MPL.py", "--overwrite", "--data_dir", options.data_dir.resolve()]
    command += ["--output_dir", options.out.resolve(), *more, *options.rest]
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
