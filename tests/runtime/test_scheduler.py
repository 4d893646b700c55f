"""Requests are batched by exit, bounded in time and number, and fail alone. The clock is the test's."""

import asyncio
import threading

import numpy as np
import pytest
import torch
from runtime_models import inputs, wrapped

import retroexit
from retroexit.errors import OptionError, QueueFull
from retroexit.runtime import Scheduler
from retroexit.runtime import scheduler as module
from retroexit.runtime.engines import Started


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class FakeEngine:
    """Samples are numbers: the exit that a threshold gives. Negative ones raise when rendered, 0 when predicted."""

    exits = 3

    def __init__(self, clock, seconds=lambda size: 0.0):
        self.clock, self.seconds, self.calls = clock, seconds, []

    def begin(self, samples, choices):
        self.calls.append(("begin", list(samples)))
        if 0 in samples:
            raise ValueError("poisoned")
        return [Started(exit or abs(sample), sample) for sample, (_, exit) in zip(samples, choices, strict=True)]

    def finish(self, states, exit):
        self.calls.append((exit, list(states)))
        self.clock.now += self.seconds(len(states))
        if min(states) < 0:
            raise SystemExit if min(states) < -1 else ValueError("poisoned")
        return [10 * state for state in states]


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def made(clock, monkeypatch):
    monkeypatch.setattr(module, "ModelEngine", lambda model, strict: model)

    def make(seconds=lambda size: 0.0, **options):
        engine = FakeEngine(clock, seconds)
        return engine, Scheduler(engine, clock=clock, start=False, **({"max_batch": 4, "max_delay_ms": 100} | options))

    return make


def run_all(scheduler):
    return sum(1 for _ in iter(scheduler.step, False))


def submit(scheduler, *samples, **options):
    return [scheduler.submit(sample, threshold=1.0, **options) for sample in samples]


def test_requests_are_predicted_together_and_rendered_by_exit(made, clock):
    engine, scheduler = made()
    futures = submit(scheduler, 1, 2, 1)
    assert run_all(scheduler) == 0  # neither full nor due
    futures += submit(scheduler, 1)
    assert run_all(scheduler) == 1 and engine.calls == [("begin", [1, 2, 1, 1])]
    futures += submit(scheduler, 1)
    clock.now += 0.05  # half of the delay is left for the queues of the exits
    assert run_all(scheduler) == 2 and engine.calls[1:] == [("begin", [1]), (1, [1, 1, 1, 1])]
    assert not futures[1].done() and scheduler.waiting == 1
    clock.now += 0.05
    run_all(scheduler)
    assert [future.result(0)[:2] for future in futures] == [(10, 1), (20, 2), (10, 1), (10, 1), (10, 1)]
    assert scheduler.batches == {(1, 4): 1, (2, 1): 1} and scheduler.waiting == 0


def test_an_exit_or_the_backbone_may_be_asked_for(made, clock):
    _engine, scheduler = made()
    first, last = scheduler.submit(1, exit=2), scheduler.submit(1)
    scheduler.close()
    assert first.result(0).exit == 2 and last.result(0).exit == 3


@pytest.mark.parametrize(
    ("seconds", "full"),
    [
        (lambda size: 1.0, 8),
        (lambda size: float(size), 1),
        (lambda size: max(1.0, size / 4), 4),
        (lambda size: size * (1.0 if size == 8 else 1.04), 8),  # 1 is enough, but 8 wait and are a little better
    ],
)
def test_a_full_batch_is_the_smallest_that_is_as_fast_per_sample_as_any(made, clock, seconds, full):
    engine, scheduler = made(seconds, max_batch=8, queue_limit=1000)
    for _ in range(4):  # all sizes are tried once
        submit(scheduler, *[1] * 40)
        clock.now += 1
        run_all(scheduler)
    submit(scheduler, *[1] * 8)
    engine.calls.clear()
    clock.now += 1
    run_all(scheduler)
    assert [len(states) for exit, states in engine.calls if exit == 1] == [full] * (8 // full)


def test_a_poisoned_request_hurts_only_itself(made, clock):
    _engine, scheduler = made()
    futures = submit(scheduler, 1, 0, -1, 1)
    run_all(scheduler)
    clock.now += 1
    run_all(scheduler)
    assert [future.exception(0) is None for future in futures] == [True, False, False, True]
    with pytest.raises(ValueError, match="poisoned"):
        futures[2].result(0)
    assert scheduler.waiting == 0


def test_the_thread_outlives_a_generator_that_ends_its_process(made, clock):
    _engine, scheduler = made()
    future, other = submit(scheduler, -2, 2)
    clock.now += 1
    run_all(scheduler)
    clock.now += 1
    run_all(scheduler)
    with pytest.raises(RuntimeError, match="the generator must return, got SystemExit"):
        future.result(0)
    assert other.result(0).image == 20


def test_a_full_queue_refuses_or_blocks(made, clock):
    _engine, scheduler = made(queue_limit=2)
    submit(scheduler, 1, 1)
    with pytest.raises(QueueFull, match="fewer than queue_limit=2 requests, got 2. Try again later, or pass block_s"):
        submit(scheduler, 1)
    clock.now += 1
    late = threading.Thread(target=lambda: submit(scheduler, 3, block_s=60))
    late.start()
    run_all(scheduler)
    late.join(60)
    assert scheduler.waiting == 1


def test_cancelled_and_late_requests_are_not_rendered(made, clock):
    engine, scheduler = made()
    (cancelled,) = submit(scheduler, 1)
    (late,) = submit(scheduler, 2, timeout_s=0.01)
    (kept,) = submit(scheduler, 3, timeout_s=1.0)
    assert cancelled.cancel()
    clock.now += 0.02
    run_all(scheduler)
    with pytest.raises(TimeoutError, match="not been begun within its timeout_s"):
        late.result(0)
    scheduler.close()
    assert kept.result(0)[:2] == (30, 3) and ("begin", [3]) in engine.calls and cancelled.cancelled()


@pytest.mark.parametrize("cancel", [False, True])
def test_closing_finishes_or_cancels_what_waits(made, cancel):
    _engine, scheduler = made()
    futures = submit(scheduler, 1, 2, 3, 1, 2)
    scheduler.step()
    scheduler.close(cancel=cancel)
    assert all(future.cancelled() if cancel else future.result(0) for future in futures)
    with pytest.raises(OptionError, match="must be open, got a closed one"):
        submit(scheduler, 1)


WRONG = {
    "both": ({"threshold": 0.1, "exit": 1}, "threshold and exit exclude each other, got 0.1 and 1"),
    "exit": ({"exit": 4}, "exit must be from 1 to 3, got 4"),
    "threshold": ({"threshold": -1}, "threshold must be a finite number >= 0, got -1"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=list(WRONG))
def test_wrong_requests_are_refused(made, options, message):
    with pytest.raises(OptionError, match=message):
        made()[1].submit(1, **options)


def test_wrong_options_are_refused(made):
    for options, message in (
        ({"max_batch": 0}, "max_batch must be >= 1"),
        ({"max_delay_ms": -1}, "must be >= 0, got -1"),
    ):
        with pytest.raises(OptionError, match=message):
            made(**options)


@pytest.fixture(params=["model", "bundle", "guided"])
def served(request):
    if request.param == "guided":
        return (wrapped(retroexit.Guidance(value_after=2)),) * 2
    model = request.getfixturevalue("model")
    return model, model if request.param == "model" else request.getfixturevalue("bundle")


def test_callers_in_many_threads_get_the_models_images(served):
    model, runs = served
    args = inputs(12)
    threshold = float(model.predict(*args).median()) + 1e-4
    with torch.no_grad():
        expected, exits = model.routed(*args, threshold=threshold)
    is_bundle = runs is not model

    def sample(i):
        return tuple(x[i].numpy() if is_bundle else x[i] for x in args)

    with Scheduler(runs, max_batch=4, max_delay_ms=1) as scheduler:

        async def main():
            futures = [scheduler.submit(sample(i), threshold=threshold) for i in range(12)]
            return await asyncio.gather(*map(asyncio.wrap_future, futures))

        results = asyncio.run(main())
        early = scheduler.submit(sample(0), exit=1).result(60)
    assert [result.exit for result in results] == exits.tolist()
    for result, image in zip(results, expected["image"], strict=True):
        np.testing.assert_allclose(np.asarray(result.image), image.numpy(), rtol=0, atol=1e-5)
    with torch.no_grad():
        first = model.image(model(*(x[:1] for x in args), exit=1))[0]
    np.testing.assert_allclose(np.asarray(early.image), first.numpy(), rtol=0, atol=1e-5)
