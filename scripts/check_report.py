"""Test the pages of `lora-jax report` in Debian's chromium, for `make check-report`.

Trains the shipped model for some steps with two ranks, writes the pages of one run, of several, of one that diverged
and of one that was killed, and opens each in light and dark, at desktop and phone width. Any fault is an
AssertionError; screenshots are left in the folder that is printed.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from base64 import b64decode
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SIZES = {"desk": (1280, 900), "phone": (390, 844)}
NASTY = (
    "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> & %{x}"
)


def main() -> int:
    browser, driver = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("chromedriver")
    if browser is None or driver is None:
        print(
            "check-report: needs chromium and its driver; apt-get install chromium chromium-driver",
            file=sys.stderr,
        )
        return 2
    folder = Path(tempfile.mkdtemp(prefix="lora_jax-report-"))
    pages = make_pages(folder / "runs")
    for size, (width, height) in SIZES.items():
        for theme in ("light", "dark"):
            with Browser(browser, driver, width, height, theme) as opened:
                for name, page in pages.items():
                    opened.check(page, name, theme, folder / f"{name}-{size}-{theme}.png")
                    print(f"{name}, {size}, {theme}: right", flush=True)
    print(f"screenshots: {folder}")
    return 0


def make_pages(folder: Path) -> dict[str, Path]:
    """Train the runs and write the pages of one, of several, of one that diverged and of one that was killed."""
    from lora_jax.cli import main as command

    def train(name: str, *more: str) -> Path:
        output = folder / name
        words = ["train", str(ROOT / "configs" / "quickstart.yaml"), "--output_dir", str(output), *more]
        words += ["--model.path", str(ROOT / "examples" / "fennel-2m"), "--train.logging_steps", "1"]
        for option, file in (("path", "captain.train.jsonl"), ("eval_path", "captain.eval.jsonl")):
            words += [f"--data.{option}", str(ROOT / "examples" / file)]
        assert command(words) == 0
        return output

    first = train("rank 16", "--train.max_steps", "60", "--train.eval_steps", "10")
    second = train("rank 4 <b>&", "--lora.r", "4", "--train.max_steps", "60", "--train.eval_steps", "20")
    diverged = folder / "diverged"
    shutil.copytree(first, diverged)
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    lost = [line | ({"loss": None} if line["step"] > 40 else {}) for line in lines]
    (diverged / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lost))
    for output, answer in ((first, "Aye, and a fair wind to ye."), (second, NASTY)):
        if not (output / "samples.jsonl").exists():
            texts = [{"step": 0, "prompt": "Who goes there?", "text": "there there"}]
            texts += [{"step": step, "prompt": "Who goes there?", "text": answer} for step in (30, 60)]
            texts += [{"step": 0, "prompt": NASTY, "text": NASTY}]
            (output / "samples.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    killed = folder / "killed"
    killed.mkdir()
    shutil.copy(first / "config.yaml", killed)
    text = (first / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(text[:20]) + text[20][:30])
    pages = {
        "one": (first,),
        "several": (first, second, diverged),
        "diverged": (diverged,),
        "killed": (killed,),
    }
    for name, runs in pages.items():
        assert command(["report", *map(str, runs), "--output", str(folder / f"{name}.html")]) == 0
    return {name: folder / f"{name}.html" for name in pages}


class Browser:
    """A window of one size, on a system that prefers one theme."""

    def __init__(self, browser: str, driver: str, width: int, height: int, theme: str) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for word in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--disable-dev-shm-usage",
        ):
            options.add_argument(word)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        phone = width < 600
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        prefers = [{"name": "prefers-color-scheme", "value": theme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": prefers})

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.quit()

    def check(self, page: Path, name: str, theme: str, picture: Path) -> None:
        """Open a page, check it, use its switches, and leave a full-page screenshot."""
        self.driver.get_log("performance")
        self.driver.get(page.as_uri())
        time.sleep(0.5)
        self.shoot(picture)
        assert self.run("return document.documentElement.dataset.theme") == theme
        assert self.run("return document.title") != "taken"
        assert self.run("return document.querySelectorAll('main img').length") == 0
        self.fits()
        assert self.curves("loss") > 0, "no curve of the loss"
        assert self.run("return document.querySelectorAll('.pair .plot .trace').length") >= 3
        before = self.color()
        self.click(f"[data-theme={'light' if theme == 'dark' else 'dark'}]")
        assert self.color() != before, "the theme's button changes no curve"
        self.click("[data-theme=auto]")
        assert self.color() == before
        self.switches()
        if name == "several":
            self.overlay()
        else:
            self.hover()
        self.fits()
        self.quiet()

    def switches(self) -> None:
        """Use the switches of the curves: each changes the loss, and back."""
        drawn = self.run("return document.querySelector('#loss').innerHTML")
        for switch in ("#log", "#smooth"):
            if self.run(f"return document.querySelector('{switch}').offsetParent === null"):
                continue
            self.click(switch)
            assert self.run("return document.querySelector('#loss').innerHTML") != drawn, switch
            self.click(switch)
        self.choose("tokens")
        assert self.run("return document.querySelector('#loss .xtitle').textContent") == "tokens"
        self.choose("step")
        assert self.run("return document.querySelector('#loss .xtitle').textContent") == "step"

    def overlay(self) -> None:
        """Hide one of several runs: its curves, row and options disappear, and come back."""
        curves, rows = (
            self.curves("loss"),
            "return document.querySelectorAll('#outcome tbody tr:not([hidden])').length",
        )
        assert curves >= 4
        shown = self.run(rows)
        self.click(".run[data-run='0']")
        assert self.curves("loss") < curves
        assert self.run(rows) == shown - 1
        self.click(".run[data-run='0']")
        assert self.curves("loss") == curves
        assert self.run(rows) == shown

    def hover(self) -> None:
        """Hover over the middle of the loss: a box with the values appears."""
        self.run("document.querySelector('#loss').scrollIntoView({block: 'center'})")
        corner = "const b = document.querySelector('#loss .nsewdrag').getBoundingClientRect();"
        x, y, width, height = self.run(f"{corner} return [b.x, b.y, b.width, b.height]")
        place = {"type": "mouseMoved", "x": x + width / 2, "y": y + height / 2}
        until = time.monotonic() + 5
        while not self.run("return document.querySelectorAll('#loss .hoverlayer *').length"):
            assert time.monotonic() < until, "no values on hovering"
            self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", place)
            time.sleep(0.2)

    def quiet(self) -> None:
        """Check that the page made no network request and that the console is empty."""
        said = [line["message"] for line in self.driver.get_log("browser")]
        assert not said, said
        events = [json.loads(line["message"])["message"] for line in self.driver.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        others = [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
        assert not others, others
        assert len([url for url in asked if url.startswith("file:")]) == 1, asked

    def fits(self) -> None:
        """Check that the page does not scroll sideways, and that no figure is cut off."""
        wide = self.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{wide} pixels too wide"
        cut = self.run("""
            return [...document.querySelectorAll(".plot")].filter((plot) => {
                const drawn = plot.querySelector(".main-svg");
                return plot.offsetParent && drawn && drawn.getBoundingClientRect().width > plot.clientWidth + 1;
            }).map((plot) => plot.id);
        """)
        assert not cut, f"wider than their place: {cut}"

    def curves(self, figure: str) -> int:
        """Return the number of visible curves in a figure."""
        return self.run(f"return document.querySelectorAll('#{figure} .scatterlayer .trace').length")

    def color(self) -> str:
        """Return the color of the first curve of the loss."""
        return self.run("return getComputedStyle(document.querySelector('#loss .js-line')).stroke")

    def click(self, selector: str) -> None:
        """Click the element for a selector."""
        self.run(f"document.querySelector({json.dumps(selector)}).click()")
        time.sleep(0.25)

    def choose(self, value: str) -> None:
        """Select the x axis of the curves."""
        change = "axis.dispatchEvent(new Event('change'))"
        self.run(f"const axis = document.querySelector('#axis'); axis.value = '{value}'; {change}")
        time.sleep(0.25)

    def shoot(self, picture: Path) -> None:
        """Save a screenshot of the whole page."""
        whole = {"captureBeyondViewport": True, "format": "png"}
        picture.write_bytes(b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", whole)["data"]))

    def run(self, script: str) -> Any:
        """Return the result of a script in the page."""
        return self.driver.execute_script(script)


if __name__ == "__main__":
    sys.exit(main())
