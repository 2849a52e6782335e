"""Chromium, its driver and axe-core for `make test-browser`. Prints what is missing, and exits with 3, where they cannot be had.

Takes what is installed. Else it installs Debian's packages, if this process may, and axe-core by npm into target/browser.
Standard library only.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "target" / "browser"
AXE = FOLDER / "node_modules" / "axe-core" / "axe.min.js"
CANNOT = 3


def done(command):
    """Whether a command succeeds; what it says is shown if it fails."""
    print("browser: " + " ".join(command), flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        found = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        print(error)
        return False
    if found.returncode != 0:
        print(found.stdout)
    return found.returncode == 0


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not shutil.which("chromedriver"):
        packages = ["apt-get", "install", "-y", "-q", "--no-install-recommends", "chromium", "chromium-driver"]
        if not (shutil.which("apt-get") and os.geteuid() == 0 and done(["apt-get", "update", "-q"]) and done(packages)):
            print("browser: chromedriver is not installed and cannot be installed here; hint: apt-get install chromium-driver")
            return CANNOT
    browser = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
    if not done([browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "about:blank"]):
        print(f"browser: {browser} does not start here")
        return CANNOT
    npm = ["npm", "install", "--silent", "--no-save", "--prefix", str(FOLDER), "axe-core@4"]
    if not AXE.exists() and not (shutil.which("npm") and done(npm) and AXE.exists()):
        print("browser: axe-core cannot be installed here; hint: install npm")
        return CANNOT
    return 0


if __name__ == "__main__":
    sys.exit(main())
