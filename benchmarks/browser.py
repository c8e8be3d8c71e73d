"""The report in a real browser: wide and phone-narrow, light and dark, with every request noted.

pip install playwright, and a Chromium (Debian: apt install chromium); then
python benchmarks/browser.py results/exp/report.html --out screenshots
"""

import argparse
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

SIZES = {"wide": (1280, 900), "phone": (375, 812)}
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
CLIPPED = """[...document.querySelectorAll('h1, h2, p, li, summary')]
    .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent.slice(0, 40))"""
BROKEN = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("screenshots"))
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    faults = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        for report in options.reports:
            for size, (width, height) in SIZES.items():
                for scheme in ("light", "dark"):
                    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                    asked: list[str] = []
                    said: list[str] = []
                    page.on("request", lambda request, asked=asked: asked.append(request.url))
                    page.on("console", lambda message, said=said: said.append(message.text))
                    page.goto(report.resolve().as_uri())
                    page.wait_for_load_state("networkidle")
                    foreign = [url[:80] for url in asked if not url.startswith(("file:", "data:"))]
                    found = {
                        "requests": foreign,
                        "console": said,
                        "pixels too wide": page.evaluate(TOO_WIDE),
                        "clipped": page.evaluate(CLIPPED),
                        "broken pictures": page.evaluate(BROKEN),
                        "elements called b": page.locator("main b").count(),
                    }
                    page.screenshot(path=options.out / f"{report.parent.name}-{size}-{scheme}.png", full_page=True)
                    faults += sum(bool(value) for value in found.values())
                    size_mb = report.stat().st_size / 1e6
                    print(report.parent.name, size, scheme, f"{size_mb:.2f} MB", found, flush=True)
                    page.close()
        browser.close()
    print(f"faults={faults}")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
