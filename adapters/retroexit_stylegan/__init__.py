"""StyleGAN2 for retroexit: a generator under the official parameter names, and the plug-in that describes it.

Weights come as a plain state dict, never as a pickled network. Where NVIDIA's code opens its own file, save
``{name: value.contiguous() for name, value in G_ema.state_dict().items()}`` as safetensors; then

```python
generator = StyleGANGenerator(resolution=256, channel_base=16384)
generator.load_state_dict(safetensors.torch.load_file("afhqcat.safetensors"))
model = retroexit.wrap(generator.eval(), attach_at=["synthesis.b16", "synthesis.b32"], scale=1 / 4)
image = model(z, exit=1)
```

Checkpoints in rosinality's layout are converted:

```python
checkpoint = torch.load("stylegan2-ffhq-config-f.pt", weights_only=True)
generator = StyleGANGenerator(resolution=1024)
generator.load_state_dict(convert_rosinality(checkpoint["g_ema"], checkpoint["latent_avg"]))
```

Objects of either code base are recognised as they are. NVIDIA's are recorded with ``noise_mode="const"``
(on a CPU with ``force_fp32=True`` too) and rosinality's with ``randomize_noise=False``; call the wrapped
generator with the same keywords. NVIDIA's code turns channel counts into plain integers, which can keep a
branch at full width; a `StyleGANGenerator` with the same weights has no such limit.
"""

from __future__ import annotations

from retroexit_stylegan.convert import convert_rosinality
from retroexit_stylegan.generator import StyleGANGenerator
from retroexit_stylegan.plugin import retroexit_describe

__all__ = ["StyleGANGenerator", "convert_rosinality", "retroexit_describe"]
