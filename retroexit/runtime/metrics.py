"""Count the answers of a server for Prometheus."""

from __future__ import annotations

from typing import Any

import prometheus_client as prometheus

from retroexit.runtime.service import OUT_OF_DISTRIBUTION, Reply

__all__ = ["Metrics"]


class Metrics:
    """Counters of one process, read off the headers of its answers."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Any:
            return prometheus.Counter(f"retroexit_{name}", text, labels, registry=self.registry)

        self.images = counter("images", "Images by exit.", "exit")
        self.errors = counter("errors", "Requests without an image, by status.", "status")
        self.fallbacks = counter("fallbacks", "Requests that the backbone had to render.", "reason")
        self.ood = counter("out_of_distribution", "Inputs out of distribution.")
        self.macs = counter("macs", "MACs spent, predictor and retrieval included.")
        self.saved = counter("macs_saved", "MACs saved, against the backbone for all.")
        self.repeated = counter("repeated", "Requests begun again, since a replica died.")
        self.seconds = prometheus.Histogram(
            "retroexit_request_seconds", "Seconds from body to image, by exit.", ["exit"], registry=self.registry
        )

    def count(self, reply: Reply, macs: int) -> None:
        """Count an image or an error; ``macs`` are the backbone's."""
        self.repeated.inc(int(reply.headers.get("X-Attempts", 1)) - 1)
        if "X-Exit" not in reply.headers:
            self.errors.labels(str(reply.status)).inc()
            return
        exit, share = reply.headers["X-Exit"], float(reply.headers["X-Macs-Share"])
        self.images.labels(exit).inc()
        self.seconds.labels(exit).observe(float(reply.headers["X-Milliseconds"]) / 1000)
        self.macs.inc(macs * share)
        self.saved.inc(max(0.0, macs * (1 - share)))
        if reason := reply.headers.get("X-Fallback"):
            self.fallbacks.labels(reason).inc()
            self.ood.inc(reason == OUT_OF_DISTRIBUTION)

    def reply(self) -> Reply:
        """Answer ``GET /metrics``."""
        text = prometheus.generate_latest(self.registry)
        return Reply(200, text, "text/plain; version=0.0.4; charset=utf-8")
