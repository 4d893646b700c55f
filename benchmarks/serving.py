"""Load test of the server on loopback: throughput, latency, and whether requests are lost or mixed up.

Clients send scenes of the demo's generator to its exits in turn, and compare every image with the one that the model
renders in this process. With Ray, a replica is killed every few seconds; the server begins its requests again.

    python benchmarks/serving.py --requests 10000 --ray --replicas 2 --kill-every 5
"""

import argparse
import http.client
import io
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

import retroexit
from retroexit.cli.serve import load_served
from retroexit.demo.generator import CHANNELS, SceneGenerator, load_scene_generator, scene_inputs
from retroexit.report.text_tables import table
from retroexit.runtime.serve import start_ray

SCENES, TOLERANCE, TRIES = 8, 1e-3, 200
OUTCOMES = ("lost", "mixed up", "failed", "begun again")
"""Requests without an image, with a wrong one, that a client had to repeat, that the server began again."""


def demo():
    """The demo's generator and an example."""
    return load_scene_generator(), tuple(x[None] for x in scene_inputs(1, 1)[0])


def small():
    """The same with an eighth of the channels and random weights, which shows what the server itself costs."""
    torch.manual_seed(0)
    return SceneGenerator(tuple(c // 8 for c in CHANNELS)).eval(), demo()[1]


def prepare(folder, generator):
    """Save a model whose branches are untrained; returns bodies and images of every scene and exit."""
    made, example = globals()[generator]()
    model = retroexit.wrap(made, [1, 2, 3, 4], [1 / 4, 1 / 4, 1 / 3, 1 / 2], min_channels=4, example_inputs=example)
    model.save(folder)
    cases = []
    for scene in scene_inputs(SCENES, 2):
        buffer = io.BytesIO()
        np.savez_compressed(buffer, labels=scene[0].numpy(), z=scene[1].numpy())
        for exit in range(1, len(model.exits) + 1):
            with torch.no_grad():
                image = model(*(x[None] for x in scene), exit=exit)[0].numpy()
            cases.append((buffer.getvalue(), exit, image))
    for exit in range(1, len(model.exits) + 1):  # the server says which exit an image is of
        images = np.stack([image.ravel() for _, number, image in cases if number == exit])
        gaps = [np.sort(np.abs(images - image).max(1))[1] for image in images]
        assert min(gaps) > 2 * TOLERANCE, f"images must differ, so that none is taken for another, got {min(gaps)}"
    return cases


class Client:
    """One connection, made again after a failure."""

    def __init__(self, port):
        self.port, self.connection, self.failed, self.begun_again = port, None, 0, 0

    def image(self, body, exit):
        """Post until an image comes; returns the reply's body."""
        for _ in range(TRIES):
            try:
                if self.connection is None:
                    self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=400)
                self.connection.request("POST", f"/render?exit={exit}", body, {"Accept": "application/x-npy"})
                reply = self.connection.getresponse()
                content = reply.read()
                self.begun_again += int(reply.headers.get("X-Attempts", 1)) - 1
                if reply.status == 200 and int(reply.headers["X-Exit"]) == exit:
                    return content
            except (OSError, http.client.HTTPException):
                self.connection = None
            self.failed += 1
            time.sleep(0.1)
        return None


def measure(port, cases, requests, clients):
    """Send requests by some clients; returns images per second, milliseconds sorted, and counts."""
    milliseconds, counts, lock = [], Counter(), threading.Lock()

    def work(first):
        client, taken, outcomes = Client(port), [], Counter()
        for number in range(first, requests, clients):
            body, exit, expected = cases[number % len(cases)]
            begin = time.perf_counter()
            content = client.image(body, exit)
            taken.append(1000 * (time.perf_counter() - begin))
            with lock:  # numpy.load is not thread-safe on Python 3.11
                image = None if content is None else np.load(io.BytesIO(content))
            is_same = image is not None and np.abs(image - expected).max() <= TOLERANCE
            outcomes["lost" if image is None else "right" if is_same else "mixed up"] += 1
        with lock:
            milliseconds.extend(taken)
            counts.update(outcomes)
            counts["failed"] += client.failed
            counts["begun again"] += client.begun_again

    threads = [threading.Thread(target=work, args=(first,)) for first in range(clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return requests / (time.perf_counter() - begin), np.sort(milliseconds), counts


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(port):
    for _ in range(1200):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/healthz")
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.1)
    raise SystemExit("error: the server did not start")


@contextmanager
def uvicorn_server(folder, generator, port):
    """Run ``retroexit serve --no-ray`` as a process of its own."""
    words = ["serve", str(folder), "--generator", f"{__file__}:{generator}", "--port", str(port), "--no-ray"]
    with subprocess.Popen([sys.executable, "-m", "retroexit", *words], stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


@contextmanager
def ray_server(folder, generator, port, replicas, kill_every):
    """Run replicas under Ray Serve, and kill one every few seconds."""
    import ray
    from ray import serve

    ray.init(include_dashboard=False)
    load = partial(load_served, folder, f"{__file__}:{generator}")
    start_ray(load, host="127.0.0.1", port=port, replicas=replicas, options={"timeout_s": 300.0})
    is_over, killed = threading.Event(), set()

    def kill():
        while not is_over.wait(kill_every):
            states = serve.status().applications["retroexit"].deployments["replica"].replica_states
            actors = {a["name"]: a for a in ray.util.list_named_actors(True)}
            alive = [name for name in actors if "SERVE_REPLICA::retroexit#replica#" in name and name not in killed]
            if states == {"RUNNING": replicas} and len(alive) == replicas:  # the one before has been replaced
                ray.kill(ray.get_actor(alive[0], actors[alive[0]]["namespace"]), no_restart=True)
                killed.add(alive[0])

    thread = threading.Thread(target=kill)
    if kill_every:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        if kill_every:
            thread.join()
        print(f"replicas killed: {len(killed)}")
        serve.shutdown()
        ray.shutdown()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--ray", action="store_true", help="Ray Serve instead of one process under uvicorn")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--kill-every", type=float, default=0.0, help="seconds between two kills, 0 for none")
    parser.add_argument("--generator", choices=("small", "demo"), default="small")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder, port = Path(place) / "model", free_port()
        cases = prepare(folder, options.generator)
        server = uvicorn_server(folder, options.generator, port)
        if options.ray:
            server = ray_server(folder, options.generator, port, options.replicas, options.kill_every)
        with server:
            wait_for(port)
            measure(port, cases, len(cases), 4)  # warms up
            for clients in options.clients:
                rate, taken, counts = measure(port, cases, options.requests, clients)
                percentiles = [f"{np.percentile(taken, share):.0f}" for share in (50, 90, 99)]
                outcomes = [str(counts[name]) for name in OUTCOMES]
                rows.append([str(clients), f"{rate:.1f}", *percentiles, *outcomes])
                print(f"{clients} clients: {rate:.1f} images/s, {counts}", flush=True)
    print(table(["clients", "images/s", "p50 ms", "p90 ms", "p99 ms", *OUTCOMES], rows))


if __name__ == "__main__":
    main()
