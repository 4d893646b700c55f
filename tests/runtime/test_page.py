"""The server's page in a browser: the slider is dragged, a picture clicked, and what is shown is the model's."""

import io
import threading
import time

import numpy as np
import pytest
import torch
from browser import chromium, find_chromium
from PIL import Image
from runtime_models import inputs, wrapped

from retroexit.runtime.payload import Payload
from retroexit.runtime.service import Service

pytest.importorskip("uvicorn")
pytest.importorskip("websockets")
import uvicorn

from retroexit.runtime.application import application

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium; apt-get install chromium"),
]


@pytest.fixture(scope="module")
def model():
    return wrapped()


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    """A server on loopback, with three examples."""
    folder = tmp_path_factory.mktemp("examples")
    torch.manual_seed(0)
    for number, (x, gain) in enumerate(zip(*inputs(3, (8, 8)), strict=True)):
        np.savez(folder / f"{number}.npz", x=x.numpy(), gain=gain.numpy())
    config = uvicorn.Config(application(Service(model, max_delay_ms=0), examples=folder), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def expected(model, number, **options):
    """Pixels of an example's image."""
    torch.manual_seed(0)
    with torch.no_grad():
        image = model(*(part[number : number + 1] for part in inputs(3, (8, 8))), **options)["image"][0].numpy()
    return np.array(Image.open(io.BytesIO(Payload(model).png(image)))).astype(int)


def pixels(page, canvas):
    script = "(c => [c.height, c.width, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data])"
    height, width, *values = page.run(f"{script}(document.getElementById({canvas!r}))")
    return np.array(values).reshape(height, width, 4)[..., :3]


def check(page, model, number, exit):
    """Compare the three pictures and the table with the model."""
    early, full = expected(model, number, exit=exit), expected(model, number)
    assert np.array_equal(pixels(page, "routed"), early) and np.array_equal(pixels(page, "backbone"), full)
    assert np.array_equal(pixels(page, "difference"), np.minimum(4 * np.abs(early - full), 255))
    texts = {name: page.run(f"document.getElementById({name!r}).textContent") for name in ("exit", "macs", "last")}
    shares = model.router.shares().tolist()
    assert texts == {"exit": str(exit), "macs": f"{100 * shares[exit - 1]:.1f}\u202f%", "last": "3"}


def test_the_slider_and_the_gallery_show_what_the_model_renders(model, address, tmp_path):
    with chromium(tmp_path) as page:
        page.open(address)
        page.wait("at('exit').textContent == '3' && document.querySelectorAll('#gallery img').length == 3")
        check(page, model, 0, 3)  # no predicted loss is below the slider's
        page.run("at('most').value = 20; at('most').onchange()")
        for begin, end, exit in ((0.01, 0.97, 1), (0.97, 0.01, 3), (0.01, 0.9, 1)):
            page.drag("#threshold", begin, end)
            page.wait(f"!busy && at('exit').textContent == '{exit}'")
            check(page, model, 0, exit)
        before = page.run("sum.images")
        page.click("#gallery button:nth-child(3)")
        page.wait(f"!busy && sum.images == {before + 1}")
        check(page, model, 2, 1)
        assert page.run("at('count').textContent") == f"Mean of {before + 1}"
        assert page.run("document.querySelector('#gallery button:nth-child(3)').getAttribute('aria-pressed')") == "true"
        mean = page.run("sum.macs / sum.images")
        assert page.run("at('mean-macs').textContent") == f"{100 * mean:.1f}\u202f%" and mean < 1
        assert page.errors == [] and page.run("at('error').textContent") == ""


@pytest.mark.parametrize("width", [400, 1920])
def test_nothing_is_cut_off_or_overlaps(address, tmp_path, width):
    with chromium(tmp_path) as page:
        page.open(address, width)
        page.wait("at('exit').textContent == '3'")
        page.run("at('threshold').oninput()")
        page.wait("!busy && at('loss').textContent != '–'")
        assert page.run("document.documentElement.scrollWidth") == width
        assert page.run("[...document.querySelectorAll('section')].every(box => box.scrollWidth <= box.clientWidth)")
        boxes = page.run("[...document.querySelectorAll('canvas')].map(c => c.getBoundingClientRect().toJSON())")
        assert all(box["left"] >= 0 and box["right"] <= width and box["width"] >= 250 for box in boxes)
        assert np.array(Image.open(io.BytesIO(page.screenshot()))).std() > 10


def test_an_error_of_the_server_is_shown(address, tmp_path):
    with chromium(tmp_path) as page:
        page.open(address)
        page.wait("at('exit').textContent == '3'")
        page.run("choose(new Blob(['no array']), null)")
        page.wait("at('error').textContent.startsWith('the body must be a PNG, .npy or .npz, got 8 bytes')")
