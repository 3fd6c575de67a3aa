"""JupyterLab in a real browser: the notebooks run, a slider moves, the picture follows, the progress bar is seen.

Needs Chromium and its driver; screenshots and the server's log are kept in `tests/artefacts` (or `TTT_ARTEFACTS`).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from ttt_lib.runs.notebook import kernel_environment

ROOT = Path(__file__).resolve().parents[2]
INSTALL = "apt-get install --no-install-recommends chromium chromium-driver"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --no-proxy-server --window-size=1400,1000"
)
LIMIT = 150.0

# The notebook that is open: its cells, and what each has shown.
CELLS = """
const panel = [...window.jupyterapp.shell.widgets('main')].find(w => w.sessionContext && w.content);
if (!panel || !panel.content.model || !panel.sessionContext.session) return null;
return {
  path: panel.context.path,
  kernel: panel.sessionContext.session.kernel ? panel.sessionContext.session.kernel.status : null,
  cells: panel.content.widgets.filter(c => c.model.type === 'code').map(c => ({
    source: c.model.sharedModel.source, count: c.model.executionCount, outputs: c.model.outputs.toJSON()})),
};
"""
SCROLL = """
const content = [...window.jupyterapp.shell.widgets('main')].find(w => w.sessionContext && w.content).content;
content.scrollToCell(content.widgets.find(c => c.model.sharedModel.source.includes(arguments[0])), 'start');
"""
# A number that changes with the bytes of the picture behind an <img>.
DIGEST = """
const done = arguments[1];
fetch(arguments[0].src).then(r => r.arrayBuffer()).then(b => crypto.subtle.digest('SHA-1', b))
  .then(d => done(Array.from(new Uint8Array(d)).join(' ')), e => done(null));
"""


@pytest.fixture(scope="module")
def artefacts() -> Path:
    """Where screenshots stay."""
    folder = Path(os.environ.get("TTT_ARTEFACTS") or ROOT / "tests" / "artefacts").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"\nscreenshots: {folder}")
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory, artefacts) -> Iterator[webdriver.Chrome]:
    """Headless Chromium. Skips without it, unless `TTT_REQUIRE_BROWSER` is set."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        reason = f"Chromium or chromedriver is missing: {INSTALL}"
        (pytest.fail if os.environ.get("TTT_REQUIRE_BROWSER") else pytest.skip)(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    chrome.set_script_timeout(60)
    yield chrome
    chrome.save_screenshot(str(artefacts / "last.png"))
    chrome.quit()


@pytest.fixture(scope="module")
def lab(tmp_path_factory, artefacts) -> Iterator[tuple[str, str, Path]]:
    """A JupyterLab of this interpreter with nothing of the user's: its address, token and folder."""
    home = tmp_path_factory.mktemp("lab")
    folder, settings = home / "notebooks", home / "settings"
    quiet = settings / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token, address = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    places = {"CONFIG": "config", "RUNTIME": "runtime", "DATA": "data"}
    environment = {f"JUPYTER_{key}_DIR": str(home / value) for key, value in places.items()}
    write_kernel_spec(home / "own" / "kernels" / "python3")  # of this interpreter, before any that is installed
    environment |= {"JUPYTER_PATH": str(home / "own"), "IPYTHONDIR": str(home / "ipython")}
    environment |= {"JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--port-retries=0",
        f"--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True", str(folder),
    ]  # fmt: skip
    with open(artefacts / "jupyterlab.log", "w") as log:
        server = subprocess.Popen(command, env={**kernel_environment(1), **environment}, stdout=log, stderr=log)
        try:
            wait("JupyterLab to answer", lambda: answers(f"{address}/api/status?token={token}") or server.poll())
            assert server.poll() is None, f"JupyterLab ended: {Path(log.name).read_text()[-2000:]}"
            yield address, token, folder
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def answers(address: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def wait(what: str, look: Callable[[], Any], seconds: float = LIMIT) -> Any:
    """What `look` returns once that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := look():
                return found
        except WebDriverException:  # the page was drawn again meanwhile
            pass
        time.sleep(0.2)
    pytest.fail(f"waited {seconds:.0f} s for {what}")


def open_notebook(browser, lab, file: str, parameters: dict[str, Any]) -> None:
    """A copy of a tutorial with these parameters and without stored outputs, open in JupyterLab."""
    address, token, folder = lab
    notebook = load_notebook_node(str(ROOT / "notebooks" / file))
    notebook = parameterize_notebook(notebook, parameters) if parameters else notebook
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    nbformat.write(notebook, folder / file)
    browser.get(f"{address}/lab/tree/{file}?token={token}&reset")
    wait(
        f"{file} and its kernel",
        lambda: (s := browser.execute_script(CELLS)) and s["path"] == file and s["kernel"] == "idle",
    )


def run_all(browser) -> None:
    """Run All Cells of the notebook that was clicked on; does not wait."""
    browser.find_element(By.CSS_SELECTOR, ".jp-Notebook .jp-MarkdownCell").click()
    browser.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells')")


def finished(browser) -> bool:
    """Whether all cells have run; fails as soon as one of them raised."""
    state = browser.execute_script(CELLS)
    for cell in state["cells"]:
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                pytest.fail(f"{cell['source']}\n{output['ename']}: {output['evalue']}")
    return state["kernel"] == "idle" and all(cell["count"] for cell in state["cells"])


def seen(browser, css: str) -> WebElement | None:
    """The first such element that is displayed."""
    return next((e for e in browser.find_elements(By.CSS_SELECTOR, css) if e.is_displayed()), None)


def picture(browser) -> str:
    """Digest of the explorer's picture; fails if the browser could not draw it."""
    image = wait("the explorer's picture", lambda: seen(browser, "img.widget-image"))
    wait("the picture to be drawn", lambda: browser.execute_script("return arguments[0].naturalWidth > 100", image))
    return browser.execute_async_script(DIGEST, image)


@pytest.mark.slow
def test_augmentation_runs_and_its_picture_follows_a_slider(browser, lab, artefacts):
    open_notebook(browser, lab, "01_augmentation.ipynb", {})
    run_all(browser)
    wait("01_augmentation to finish", lambda: finished(browser))
    browser.execute_script(SCROLL, "point_cloud(")
    wait("the point cloud", lambda: seen(browser, ".js-plotly-plot .main-svg"))
    browser.save_screenshot(str(artefacts / "01_point_cloud.png"))

    browser.execute_script(SCROLL, "ViewExplorer(")
    before = picture(browser)
    browser.save_screenshot(str(artefacts / "01_explorer_before.png"))
    slider = "//*[contains(@class,'widget-slider')][.//label[text()='colour severity']]"
    handle = wait("the slider", lambda: browser.find_element(By.XPATH, f"{slider}//*[contains(@class,'noUi-handle')]"))
    readout = browser.find_element(By.XPATH, f"{slider}//*[contains(@class,'widget-readout')]")
    assert readout.text == "3"
    handle.send_keys(Keys.ARROW_RIGHT)
    wait("the slider to move", lambda: readout.text == "4", 30)
    wait("the picture to change", lambda: picture(browser) != before, 60)
    browser.save_screenshot(str(artefacts / "01_explorer_after.png"))
    handle.send_keys(Keys.ARROW_LEFT)
    wait("the same picture as at first", lambda: picture(browser) == before, 60)


@pytest.mark.slow
def test_adaptation_shows_its_progress_and_its_results(browser, lab, artefacts):
    short = {"name": "short", "train": {"passes": 256}, "data": [{"kind": "shifted", "count": 3}]}
    open_notebook(browser, lab, "02_adaptation.ipynb", short)
    run_all(browser)

    def bar() -> WebElement | None:
        browser.execute_script(SCROLL, "run_experiment(config")
        return seen(browser, ".widget-hprogress")

    def label() -> str:
        found = bar()
        return found.find_element(By.XPATH, "./..").text if found else ""

    wait("the progress bar", bar)
    browser.save_screenshot(str(artefacts / "02_progress.png"))
    wait("a sample to be counted", lambda: "1/3" in label() or "2/3" in label())
    assert not finished(browser), "the bar was not there while it ran"
    browser.save_screenshot(str(artefacts / "02_progress.png"))
    wait("02_adaptation to finish", lambda: finished(browser))
    wait("the bar to be full", lambda: "3/3" in label(), 30)
    browser.save_screenshot(str(artefacts / "02_finished.png"))
    browser.execute_script(SCROLL, "plot_before_after(")
    browser.save_screenshot(str(artefacts / "02_results.png"))
