"""Export a fitted model, and run it as a server would: with NumPy and onnxruntime, without torch.

retroexit demo --out retroexit-demo
python examples/export_and_run.py retroexit-demo/ms-ssim exported
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import retroexit
from retroexit.demo import load_scene_generator, scene_inputs
from retroexit.demo.run import TEST_SEED
from retroexit.runtime import bundle

SERVER = """
import sys
import numpy as np
sys.path.insert(0, {runner!r})
import bundle

model = bundle.load_bundle({folder!r})
scenes = np.load({scenes!r})
print(model)
for threshold in {thresholds}:
    images, exits = model.run(scenes["labels"], scenes["styles"], threshold=threshold)
    print(f"threshold {{threshold}}: images {{images.shape}}, exits {{exits.tolist()}}")
print("torch was imported:", "torch" in sys.modules)
"""


def main() -> None:
    """Export, then run in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with the demo's fitted model")
    parser.add_argument("out", type=Path, help="folder for the export")
    parser.add_argument("--format", choices=("onnx", "torch", "aoti"), default="onnx")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--scenes", type=int, default=8)
    arguments = parser.parse_args()

    samples = scene_inputs(arguments.scenes, TEST_SEED)
    labels, styles = (torch.stack(column) for column in zip(*samples, strict=True))
    model = retroexit.load(arguments.model, load_scene_generator(), (labels[:1], styles[:1]))
    retroexit.export(model, arguments.out, arguments.format)
    scenes = arguments.out.with_suffix(".npz")
    np.savez(scenes, labels=labels.numpy(), styles=styles.numpy())
    runner = str(Path(bundle.__file__).parent)  # or wherever bundle.py was copied to
    places = {"runner": runner, "folder": str(arguments.out), "scenes": str(scenes)}
    code = SERVER.format(**places, thresholds=arguments.thresholds)
    server = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    print(server.stdout)


if __name__ == "__main__":
    main()
