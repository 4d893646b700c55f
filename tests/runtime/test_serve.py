"""Requests over HTTP: options, bodies, errors, metrics, and routing that fails closed."""

import asyncio
import importlib.util
import io
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from runtime_models import inputs, wrapped
from torch import nn

import retroexit
from retroexit.errors import MissingExtraError, OptionError, QueueFull
from retroexit.routing.predictor import Predictor
from retroexit.runtime.payload import npy
from retroexit.runtime.service import Reply, Service

pytest.importorskip("starlette")
pytest.importorskip("httpx")
from starlette.testclient import TestClient

from retroexit.runtime.application import application
from retroexit.runtime.serve import Replicas, run_uvicorn, start_ray

NPY = {"accept": "application/x-npy"}


def npz(x, gain, **others):
    buffer = io.BytesIO()
    np.savez(buffer, x=x, gain=gain, **others)
    return buffer.getvalue()


def bundle_npz(x, gain):
    buffer = io.BytesIO()
    np.savez(buffer, input0=x, input1=gain)
    return buffer.getvalue()


@pytest.fixture
def client(model):
    with TestClient(application(Service(model, max_batch=4, max_delay_ms=0), max_megabytes=0.1)) as client:
        yield client


@pytest.fixture
def sample():
    x, gain = inputs(1)
    return x[0].numpy(), gain[0].numpy()


@pytest.fixture
def backbone(model, sample):
    x, gain = (torch.from_numpy(np.array(part))[None] for part in sample)
    with torch.no_grad():
        return model(x, gain)["image"][0].numpy()


def image_of(reply):
    assert reply.status_code == 200, reply.text
    return np.load(io.BytesIO(reply.content))


def served(reply):
    return int(reply.headers["x-exit"]), reply.headers.get("x-fallback")


def test_options_choose_the_exit_and_headers_say_which(client, model, sample, backbone):
    body, gpu = npz(*sample), (torch.from_numpy(np.array(part))[None] for part in sample)
    args = tuple(gpu)
    for query in ("", "?exit=3", "?quality=lossless", "?threshold=0"):
        reply = client.post(f"/render{query}", content=body, headers=NPY)
        assert np.allclose(image_of(reply), backbone, atol=1e-6) and served(reply) == (3, None)
    reply = client.post("/render?exit=1", content=body, headers=NPY)
    with torch.no_grad():
        assert np.allclose(image_of(reply), model(*args, exit=1)["image"][0].numpy(), atol=1e-6)
    assert served(reply) == (1, None) and float(reply.headers["x-macs-share"]) == pytest.approx(
        model.exits[0].share, 1e-3
    )
    threshold = float(model.predict(*args)[0, 0]) * 100
    reply = client.post("/render", content=body, headers={"x-threshold": str(threshold)})
    exit = int(model.choose_exits(*args, threshold=threshold))
    assert served(reply) == (exit, None) and reply.headers["content-type"] == "image/png" and exit < 3
    assert float(reply.headers["x-predicted-loss"]) == pytest.approx(float(model.predict(*args)[0, exit - 1]), rel=1e-4)
    budget = client.post("/render?budget=0.9", content=body)
    assert served(budget) == (int(model.choose_exits(*args, budget=0.9)), None)
    model.measure_latency(*args, runs=3)
    slowest = 10 * max(model.latency.milliseconds)
    assert served(client.post(f"/render?budget_ms={slowest}", content=body))[0] == 3
    model.latency = None
    metrics = client.get("/metrics").text
    assert 'retroexit_images_total{exit="3"}' in metrics and "retroexit_macs_saved_total" in metrics


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?threshhold=1", "no option 'threshhold'; closest: 'threshold'"),
        ("?threshold=-1", "threshold must be a finite number, got '-1'. Pass one >= 0, such as 0.1."),
        ("?threshold=nan", "got 'nan'"),
        ("?budget=0", "budget must be a finite number, got '0'. Pass one > 0, such as 0.5."),
        ("?exit=4", "exit must be an integer from 1 to 3, the backbone, got '4'"),
        ("?exit=one", "got 'one'"),
        ("?quality=best", "quality must be lossless, high, draft, got 'best'"),
        ("?exit=1&threshold=1", "exclude each other"),
        ("?deadline_ms=5", "needs measured times, but the model has none. Call model.measure_latency"),
        ("?budget_ms=5", "budget=Time(share=None, ms=5.0) needs measured times"),
        ("?budget_ms=0", "budget_ms must be a finite number, got '0'. Pass one > 0"),
        ("?deadline_ms=0", "deadline_ms must be a finite number, got '0'. Pass one > 0"),
        ("?deadline_ms=inf", "got 'inf'"),
        ("?budget=50", "budget must be a share of the backbone's compute, such as 0.5, got 50.0. Pass 0.5 for 50 %."),
        ("?budget=0.001", "got 0.001"),
        ("?exit=0", "exit must be an integer from 1 to 3"),
        ("?exit=1.5", "got '1.5'"),
        ("?exit=", "got ''"),
    ],
)
def test_options_that_cannot_be_met_are_refused(client, sample, query, message):
    reply = client.post(f"/render{query}", content=npz(*sample))
    assert reply.status_code == 400 and message in reply.json()["error"]
    assert 'retroexit_errors_total{status="400"} 1.0' in client.get("/metrics").text


X, GAIN = np.zeros((4, 8, 8), np.float32), np.float32(1)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "the body must be a PNG, .npy or .npz, got 0 bytes of another kind. Send x: float32 (4, 8, 8)"),
        (npy(X), 400, "the body must be an .npz with 2 arrays, got one array"),
        (npz(X, GAIN)[:90], 400, "readable by numpy.load"),
        (npz(X, GAIN, y=GAIN), 400, "the arrays must be ['gain', 'x'], got ['gain', 'x', 'y']"),
        (npz(X[:3], GAIN), 400, "x must have the shape (4, 8, 8), got (3, 8, 8)"),
        (npz(X.astype(int), GAIN), 400, "x must be float32, got int64"),
        (npz(X * np.nan, GAIN), 400, "x must be finite"),
        (bytes(100_001), 413, "at most 0.1 MB, got 0.1. Send a smaller one, or start with --max-megabytes"),
    ],
)
def test_bodies_that_cannot_be_read_are_refused(client, body, status, message):
    reply = client.post("/render", content=body)
    assert reply.status_code == status and message in reply.json()["error"]


def raises(*_args, **_kwargs):
    raise RuntimeError("broken")


def spoil(output):
    """The same output with NaN in every tensor."""
    if isinstance(output, torch.Tensor):
        return output * torch.nan
    if isinstance(output, dict):
        return {name: spoil(value) for name, value in output.items()}
    return type(output)(map(spoil, output)) if isinstance(output, (tuple, list)) else output


class Broken(nn.Module):
    """A predictor that raises, or predicts NaN."""

    def __init__(self, is_raising):
        super().__init__()
        self.is_raising = is_raising

    def forward(self, feature):
        return raises() if self.is_raising else feature.new_full((len(feature), 2), torch.nan)


def break_branches(model, patch, is_raising):
    for branch in model.branches:
        run = branch.forward
        patch.setattr(branch, "forward", raises if is_raising else lambda *a, run=run, **k: spoil(run(*a, **k)))


def break_predictor(model, patch, is_raising):
    patch.setitem(model.router._modules, "predictor", Broken(is_raising))


def break_guides(model, patch, is_raising):
    run = model.guide.guide
    patch.setattr(model.guide, "guide", raises if is_raising else lambda *args: spoil(run(*args)))


FAULTS = {
    "predictor raises": (break_predictor, True, "routing failed"),
    "prediction is NaN": (break_predictor, False, "out of distribution"),
    "branch raises": (break_branches, True, "routing failed"),
    "image is NaN": (break_branches, False, "image not finite"),
    "search raises": (break_guides, True, "routing failed"),
    "guide is NaN": (break_guides, False, "image not finite"),
}


@pytest.fixture(scope="module")
def guided():
    return wrapped(retroexit.Guidance(value_after=2))


@pytest.mark.parametrize(("damage", "is_raising", "reason"), FAULTS.values(), ids=list(FAULTS))
def test_what_breaks_in_routing_leads_to_the_backbone(guided, sample, damage, is_raising, reason, monkeypatch):
    body = npz(*sample)
    with torch.no_grad():
        full = guided(*(torch.from_numpy(np.array(part))[None] for part in sample))["image"][0].numpy()
    with TestClient(application(Service(guided, max_delay_ms=0))) as client:
        assert served(client.post("/render?threshold=1000", content=body)) == (1, None)
        damage(guided, monkeypatch, is_raising)
        reply = client.post("/render?threshold=1000", content=body, headers=NPY)
        assert served(reply) == (3, reason) and np.allclose(image_of(reply), full, atol=1e-6)
        draft = client.post("/draft-and-refine?threshold=1000", content=body)
        assert draft.content.count(b"\x89PNG") <= 1 and b"X-Exit: 1" not in draft.content
        assert draft.status_code == 500 or b"X-Exit: 3" in draft.content
        asked = client.post("/render?exit=1", content=body, headers=NPY)
        is_early = asked.status_code == 200 and served(asked)[0] == 1
        assert is_early == (damage is break_predictor)  # an exit that the caller chooses needs no prediction


@pytest.mark.parametrize("is_raising", [True, False])
def test_a_broken_predictor_spends_no_budget_on_guesses(client, model, sample, is_raising, monkeypatch):
    break_predictor(model, monkeypatch, is_raising)
    reply = client.post("/render?budget=0.9", content=npz(*sample))
    assert served(reply) == (3, "routing failed" if is_raising else "out of distribution")


def test_a_void_promise_leads_to_the_backbone(client, model, sample, backbone, monkeypatch):
    monkeypatch.setattr(model.router.ood_counter, "enabled", False)  # the guard is off
    reply = client.post("/render?threshold=1000", content=npz(*sample), headers=NPY)
    assert served(reply) == (3, "void promise") and np.allclose(image_of(reply), backbone, atol=1e-6)
    parts = client.post("/draft-and-refine?threshold=1000", content=npz(*sample)).content
    assert parts.count(b"\x89PNG") == 1 and b"X-Fallback: void promise" in parts


def test_routing_of_an_export_fails_closed_too(bundle, sample, monkeypatch):
    body, program = bundle_npz(*sample), bundle.programs["predictor"]
    with TestClient(application(Service(bundle, max_delay_ms=0))) as client:
        assert served(client.post("/render?threshold=1000", content=body))[0] < 3
        for query, message in (
            (
                "render?deadline_ms=5",
                "deadline_ms needs a folder that fit wrote, got an export. Pass exit or threshold.",
            ),
            ("render?budget=50", "Pass 0.5 for 50 %."),
            ("render?budget=0.001", "budget must be >= 0."),
            ("draft-and-refine", "drafts need a folder that fit wrote, got an export. Post to /render instead."),
        ):
            reply = client.post(f"/{query}", content=body)
            assert reply.status_code == 400 and message in reply.json()["error"]
        run = program.run
        monkeypatch.setattr(program, "run", lambda arrays: [np.full_like(a, np.nan) for a in run(arrays)])
        assert served(client.post("/render?budget=0.9", content=body)) == (3, "out of distribution")
        monkeypatch.setattr(program, "run", raises)
        for option in ("budget=0.9", "threshold=1000"):
            assert served(client.post(f"/render?{option}", content=body)) == (3, "routing failed")
        monkeypatch.setitem(bundle.manifest["router"], "feature_size", [99, 99])
        assert served(client.post("/render?threshold=1000", content=body)) == (3, "void promise")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (QueueFull("the queue must have fewer"), 503, "the queue must have fewer"),
        (TimeoutError(), 504, "must be done within 30 s, got no image. Try again later."),
        (RuntimeError("no memory"), 500, "RuntimeError: no memory"),
    ],
)
def test_what_fails_in_the_server_has_a_status(client, sample, monkeypatch, error, status, message):
    def submit(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(client.app.state.backend.scheduler, "submit", submit)
    reply = client.post("/render?threshold=1", content=npz(*sample))
    assert reply.status_code == status and message in reply.json()["error"]
    assert reply.headers.get("retry-after") == ("1" if status == 503 else None)


def test_a_draft_comes_before_the_image(client, model, sample, backbone):
    reply = client.post("/draft-and-refine", content=npz(*sample))
    assert reply.headers["content-type"] == "multipart/x-mixed-replace; boundary=image"
    first, second, end = reply.content.split(b"--image")[1:]
    assert b"X-Exit: 1" in first and b"X-Exit: 3" in second and end == b"--\r\n"
    pixels = np.array(Image.open(io.BytesIO(second.split(b"\r\n\r\n", 1)[1])))
    plain = client.post("/render", content=npz(*sample)).content
    assert np.array_equal(pixels, np.array(Image.open(io.BytesIO(plain))))


def test_the_page_and_its_examples(model, tmp_path):
    (tmp_path / "one.npz").write_bytes(npz(X, GAIN))
    with TestClient(application(Service(model), examples=tmp_path)) as client:
        page = client.get("/").text
        assert "<html" in page and "http" not in page.replace("https", "http").split("<body>")[0]
        assert client.get("/info").json()["examples"] == ["one.npz"]
        assert client.get("/examples/one.npz").content == npz(X, GAIN)
        assert client.get("/examples/..%2Fsecret").status_code == 404
        assert client.get("/healthz").json() == {"status": "ok", "waiting": 0}
    assert TestClient(client.app).get("/healthz").status_code == 503
    with pytest.raises(OptionError, match=r"examples must be a folder .*got nowhere"):
        application(Service(model), examples="nowhere")


class Painter(nn.Module):
    """Paints the mean of its input, so that each input has an image of its own."""

    def __init__(self, channels=1):
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(c, 3, 1) for c in (channels, 3, 3))
        for stage in self.stages:
            nn.init.constant_(stage.weight, 1 / stage.in_channels)
            nn.init.zeros_(stage.bias)

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return x


def painter(channels=1):
    example = (torch.rand(1, channels, 4, 4),)
    options = {"min_channels": 3, "adapter": False, "image_range": (0.0, 1.0), "example_inputs": example}
    model = retroexit.wrap(Painter(channels).eval(), [1], 1 / 2, stages=["stages.0", "stages.1", "stages.2"], **options)
    model.predictor = Predictor(3, 1).eval()
    return model


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_png_is_an_image_or_a_label_map(channels):
    shape = (4, 4, 3) if channels == 3 else (4, 4)
    pixels = np.random.default_rng(0).integers(0, 5 if channels == 5 else 256, shape).astype(np.uint8)
    with TestClient(application(Service(painter(channels), max_delay_ms=0))) as client:
        image = image_of(client.post("/render", content=png(pixels), headers=NPY))
        if channels == 5:
            assert np.allclose(image, 0.2)
            reply = client.post("/render", content=png(pixels + 3))
            assert "labels must be from 0 to 4, got 7. Correct the map." in reply.json()["error"]
        else:
            mean = (pixels / 255).reshape(4, 4, -1).mean(-1)
            assert np.allclose(image, mean, atol=1e-6)
        reply = client.post("/render", content=png(np.zeros((5, 4), np.uint8)))
        assert reply.status_code == 400 and "got (5, 4) pixels" in reply.json()["error"]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def post(port, body):
    request = urllib.request.Request(f"http://127.0.0.1:{port}/render", body, {"Accept": "application/x-npy"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return reply.read()


def send_all(port, count, clients):
    """Send inputs of one value each, and compare their images with it."""
    bodies = [npy(np.full((1, 4, 4), i / count, np.float32)) for i in range(count)]
    replies = [None] * count

    def work(first):
        for i in range(first, count, clients):
            replies[i] = post(port, bodies[i])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in replies
    # Read here: in several threads at once, numpy.load fails now and then on Python 3.11 (its ast is not thread-safe).
    images = [np.load(io.BytesIO(reply)) for reply in replies]
    assert all(np.allclose(image, i / count, atol=1e-6) for i, image in enumerate(images))


def wait_for(port):
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not start")


def test_a_server_process_mixes_up_no_requests():
    port = free_port()
    code = (
        f"import sys; sys.path[:0] = {[*sys.path]!r}\nfrom test_serve import painter\n"
        "from retroexit.runtime.serve import run_uvicorn\n"
        f"run_uvicorn(painter, host='127.0.0.1', port={port}, options={{'max_delay_ms': 1}})"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as server:
        try:
            wait_for(port)
            send_all(port, 50, 8)
        finally:
            server.terminate()


@contextmanager
def replicas_under_ray(**count):
    import ray
    from ray import cloudpickle, serve

    port = free_port()
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        start_ray(painter, host="127.0.0.1", port=port, options={"max_delay_ms": 1}, **count)
        yield port
    finally:
        serve.shutdown()
        ray.shutdown()


needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


@pytest.mark.long
@needs_ray
@pytest.mark.filterwarnings("ignore")
def test_replicas_under_ray_mix_up_no_requests():
    with replicas_under_ray(replicas=2) as port:
        send_all(port, 50, 8)


@pytest.mark.long
@needs_ray
@pytest.mark.filterwarnings("ignore")
def test_more_replicas_start_under_load():
    from ray import serve

    with replicas_under_ray(replicas=1, max_replicas=2) as port:
        for _ in range(200):
            send_all(port, 200, 16)
            states = serve.status().applications["retroexit"].deployments["replica"].replica_states
            if states.get("RUNNING") == 2:
                break
        assert states == {"RUNNING": 2}


class Died(Exception):
    """Stands for what Ray raises when a replica dies."""


class Handle:
    """A handle of Ray Serve whose replicas die in the first calls, or after the first part."""

    def __init__(self, deaths, parts=2):
        self.deaths, self.parts, self.calls = deaths, parts, 0
        self.render = self.draft_and_refine = self

    def options(self, stream):
        self.draft_and_refine = types.SimpleNamespace(remote=self._stream)
        return self

    async def remote(self, *_):
        self.calls += 1
        if self.calls <= self.deaths:
            raise Died("the actor died")
        return Reply(200, b"image", "image/png", {"X-Exit": "3"})

    async def _stream(self, *_):
        yield await self.remote()
        if self.parts == 1:
            raise Died("the actor died")
        yield Reply(200, b"refined", "image/png")


@pytest.fixture
def fake_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    monkeypatch.setitem(sys.modules, "ray.exceptions", types.SimpleNamespace(RayError=Died))


@pytest.mark.parametrize(("deaths", "status"), [(0, 200), (2, 200), (3, 500)])
def test_another_replica_renders_what_one_that_died_has_left(fake_ray, deaths, status):
    handle = Handle(deaths)
    reply = asyncio.run(Replicas(handle, 5).render({}, {}, b""))
    assert reply.status == status and handle.calls == min(deaths + 1, 3)
    assert reply.headers.get("X-Attempts") == (str(deaths + 1) if status == 200 else None)


@pytest.mark.parametrize(("deaths", "parts", "contents"), [(1, 2, [b"image", b"refined"]), (0, 1, [b"image"] * 2)])
def test_drafts_are_refined_although_a_replica_dies(fake_ray, deaths, parts, contents):
    async def collect():
        return [part.content async for part in Replicas(Handle(deaths, parts), 5).draft_and_refine({}, {}, b"")]

    assert asyncio.run(collect()) == contents


def test_no_replica_in_time_is_a_time_out(fake_ray, monkeypatch):
    handle = Handle(0)
    monkeypatch.setattr(handle, "remote", lambda *_: asyncio.sleep(5))
    reply = asyncio.run(Replicas(handle, 0.01).render({}, {}, b""))
    assert reply.status == 504 and b"must be done within 0.01 s" in reply.content


@pytest.mark.parametrize(("extra", "start"), [("uvicorn", run_uvicorn), ("ray", start_ray)])
def test_a_missing_server_is_named_with_the_line_that_installs_it(monkeypatch, extra, start):
    monkeypatch.setitem(sys.modules, extra, None)
    more = {"replicas": 1} if extra == "ray" else {}
    with pytest.raises(MissingExtraError, match=rf"got no {extra}\. Run: pip install 'retroexit\[serve\]'"):
        start(painter, host="127.0.0.1", port=1, options={}, **more)
