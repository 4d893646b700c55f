"""Evaluations with made-up numbers."""

import numpy as np
import pytest

from retroexit.evaluation.sweep import Evaluation


@pytest.fixture(scope="session")
def make_evaluation():
    """Build an evaluation of ``samples`` and ``branches`` whose losses fall and costs grow with the exit."""

    def make(samples=60, branches=3, noise=0.01, seed=0, **more):
        random = np.random.default_rng(seed)
        difficulty = random.gamma(4, 0.25, samples)
        base = np.linspace(0.12, 0.03, branches)
        loss = base * difficulty[:, None] * random.uniform(0.9, 1.1, (samples, branches))
        macs = np.append(np.linspace(0.2, 0.7, branches), 1.0) * 9e9
        fields = {
            "loss": loss,
            "predicted": loss + noise * random.standard_normal(loss.shape),
            "macs": macs,
            "overhead": np.append(np.full(branches, 0.3e9), 0.1e9),
            "metric": {"name": "lpips-alex", "net": "alex", "sha256": "ab" * 32, "versions": {"torch": "2.15.0"}},
            "exits": [
                {"index": k + 1, "attach_at": 2 * k + 2, "macs": float(macs[k]), "parameters": 1000 * (k + 1)}
                for k in range(branches)
            ],
            "distance": 0.5 + difficulty + 0.3 * random.standard_normal(samples),
            "seconds": macs / 4e10,
            "about": {"data": "made up", "seed": seed},
        }
        return Evaluation(**(fields | more))

    return make
