"""The code of docs/deployment.md runs, block after block."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs/deployment.md"


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    space = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), space)
    assert len(space["images"]) == 6 and space["images"][0].shape == (3, 32, 32)
    assert len(set(space["exits"].tolist())) == 2
