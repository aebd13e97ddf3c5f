"""A real headless Chromium for tests of our pages; skips, saying why, where there is none."""

import shutil
import tempfile

import pytest


def browser(width, height):
  webdriver = pytest.importorskip("selenium.webdriver", reason="pip install -e '.[test]'")
  chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
  if not chromium or not chromedriver:
    pytest.skip("chromium and chromedriver are not installed (Debian: chromium chromium-driver)")
  options = webdriver.ChromeOptions()
  options.binary_location = chromium
  profile = tempfile.mkdtemp()
  for flag in (
    "headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "disable-quic", f"user-data-dir={profile}",
  ):  # fmt: skip
    options.add_argument(f"--{flag}")
  options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
  service = webdriver.chrome.service.Service(chromedriver)
  driver = webdriver.Chrome(options=options, service=service)
  metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
  driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
  return driver
