"""`ecar gallery`: its page, asked by gradio's client and, where there is one, by a browser."""

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
from PIL import Image

from ecar.cli.gallery import check_place, drawn_stages, make_page, sheet
from ecar.cli.parser import UsageError

from .conftest import NAMES


def test_stages_come_one_by_one_and_end_in_the_pipelines_image(pipe):
    seen = []
    for states in drawn_stages(pipe, [3, 5], 7, 6, 2.0, None):
        seen.append(len(states))
    assert seen == [1, 2]
    output = pipe([3, 5], 6, 2.0, seeds=[7, 7], return_stages=True, progress=False)
    for shown, drawn in zip(states, [*output.stage_images[:-1], output.images], strict=True):
        assert [np.asarray(a).tolist() for a in shown] == [np.asarray(a).tolist() for a in drawn]


def test_drawing_ends_where_nobody_looks(pipe):
    drawing = drawn_stages(pipe, [0], 0, 10**6, 1.0, None)
    drawing_ends = drawn_stages(pipe, [0], 0, [2, 10**6], 1.0, None)
    next(drawing_ends)
    drawing_ends.close()  # returns, though most steps are ahead
    drawing.close()


def test_an_error_is_raised_where_it_is_looked_for(pipe):
    with pytest.raises(ValueError, match="at least one step for each of 2 stages"):
        list(drawn_stages(pipe, [0], 0, 1, 1.0, None))


def test_a_sheet_is_dark_where_nothing_is_drawn_yet():
    white = Image.new("L", (4, 4), 255)
    picture = np.asarray(sheet([[white, white]], ["a", "b"], 3, 16))
    rows, first = picture[8::18], picture.shape[1] - 3 * 18
    for row in rows[:2]:
        assert row[first + 8] == 255 and row[first + 26] == row[first + 44] == 0


@pytest.fixture
def address(folder):
    """Of the page of `ecar gallery`, run as a user runs it; ended by Ctrl-C."""
    pytest.importorskip("gradio", reason="needs ecar[gallery]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["gallery", "--checkpoint", "model", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ecar", *words], cwd=folder, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        line = process.stdout.readline().strip()
        assert line == f"http://127.0.0.1:{port}/", process.communicate()[1]
        yield line
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (130, ""), errors
        assert errors.endswith("ecar: interrupted\n") and "Traceback" not in errors
    finally:
        process.kill()


def test_a_client_gets_the_stages(address, pipe):
    from gradio_client import Client

    client = Client(address, verbose=False)
    job = client.submit([3, 5], 7, 6, 2.0, api_name="/draw")
    final = np.asarray(Image.open(job.result(timeout=120)))
    assert len(job.outputs()) >= 2
    *_, states = drawn_stages(pipe, [3, 5], 7, 6, 2.0, None)
    expected = np.asarray(sheet(states, [NAMES[3], NAMES[5]], 2, 128))
    assert np.array_equal(final, expected)
    with pytest.raises(Exception, match="at least one class"):
        client.predict([], 7, 6, 2.0, api_name="/draw")
    with urllib.request.urlopen(address) as page:
        assert "E-CAR: model" in page.read().decode()


def test_a_browser_draws(address):
    """Headless: the page opens, Draw is pressed, a picture comes."""
    sync = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    names = ("chromium-headless-shell", "chromium", "google-chrome")
    browser_path = next(filter(None, map(shutil.which, names)), None)
    with sync.sync_playwright() as playwright, contextlib.ExitStack() as stack:
        try:
            browser = playwright.chromium.launch(executable_path=browser_path)
        except sync.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        stack.callback(browser.close)
        page = browser.new_page()
        page.goto(address)
        page.get_by_role("button", name="Draw", exact=True).click(timeout=60_000)
        picture = page.locator("img[src*='/file=']").first
        picture.wait_for(timeout=120_000)
        assert page.evaluate("() => document.title") == "E-CAR: model"
        width = "i => i.decode().then(() => i.naturalWidth)"
        assert picture.evaluate(width) > 2 * 128


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # gradio's socket
def test_a_port_in_use(folder, refused):
    pytest.importorskip("gradio", reason="needs ecar[gallery]")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port: cannot use {port}, give another (" in refused(
            f"gallery --checkpoint model --device cpu --port {port}"
        )


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("nosuchhost.invalid", 7860, "--host: no such address: 'nosuchhost.invalid' ("),
        ("999.1.1.1", 7860, "--host: no such address: '999.1.1.1' ("),
        ("a" * 64, 7860, "--host: no such address: 'aaaa"),
        ("192.0.2.1", 7860, "--host: 192.0.2.1 is not an address of this machine"),
        ("127.0.0.1", None, "--port: cannot use "),
    ],
)
def test_where_no_page_can_be(host, port, message):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        in_use = taken.getsockname()[1]
        with pytest.raises(UsageError) as error:
            check_place(host, port or in_use)
    assert str(error.value).startswith(message)
    check_place("127.0.0.1", in_use)


def test_without_gradio(pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"pip install 'ecar\[gallery\]'"):
        make_page(pipe, "model")
