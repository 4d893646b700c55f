"""StyleGAN2 for retroexit: a generator under the official parameter names, and the plug-in that describes it.

Weights come from NVIDIA's state dict or from a checkpoint of rosinality's code; code in the files is never run.

```python
generator = load_generator("stylegan2-ffhq-config-f.pt")
model = retroexit.wrap(generator, attach_at=["synthesis.b16", "synthesis.b32"], scale=1 / 4)
image = model(z, exit=1)
```

Live values at every cut are the image so far and the style vectors. Arguments that are not tensors, such as
the truncation, are fixed when the generator is recorded. To choose truncation and style mixing in every call,
wrap the synthesis network:

```python
model = retroexit.wrap(generator.synthesis, attach_at=["b16", "b32"], scale=1 / 4)
image = model(generator.mapping(z, truncation_psi=0.7, truncation_cutoff=8), exit=1)
```

From the same random state, a call draws the same noise at every exit. Noise that is passed as an input,
``noise=maps``, belongs to its sample, in training and in batches of different exits too.

Objects of NVIDIA's and rosinality's own code are recognised, NVIDIA's synthesis network too.
NVIDIA's are recorded with ``noise_mode="const"`` (on a CPU with ``force_fp32=True`` too) and rosinality's
with ``randomize_noise=False``; call the wrapped generator with the same keywords. NVIDIA's code turns channel
counts into plain integers, which can keep a branch at full width; a `StyleGANGenerator` with the same weights
has no such limit.
"""

from __future__ import annotations

from retroexit_stylegan.checkpoint import load_generator
from retroexit_stylegan.convert import convert_rosinality
from retroexit_stylegan.discriminator import Discriminator
from retroexit_stylegan.generator import StyleGANGenerator
from retroexit_stylegan.plugin import retroexit_describe

__all__ = ["Discriminator", "StyleGANGenerator", "convert_rosinality", "load_generator", "retroexit_describe"]
