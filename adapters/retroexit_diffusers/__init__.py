"""Latent decoders of diffusers for retroexit: the plug-in that describes them, and their use in a pipeline.

```python
model = retroexit.wrap(pipe.vae, attach_at=[1, 2, 3], scale=1 / 4)  # or pipe.vae.decoder
with gather_latents(pipe, model) as latents:  # the inputs of the decoder, sample by sample
    for prompt in prompts:
        pipe(prompt)
retroexit.fit(model, latents, "runs/vae")

with early_exits(pipe, model, threshold=0.1):
    images = pipe("a street").images
```

To preview many latents and decode a chosen one in full, inside such a block or with the exits installed:

```python
with retroexit.draft(pipe, latents, exit=1) as draft:
    show(draft.image)
    image = draft.finish([3])
```

To install and remove the exits without a ``with`` block:

```python
pipe.vae.decoder = EarlyExitDecoder(model, threshold=0.1)
pipe.vae.decoder = model.unwrap()
```

The plug-in recognises the decoders of ``AutoencoderKL`` and of autoencoders that share its class (FLUX.2's,
``VQModel``), of ``AutoencoderTiny``, ``AutoencoderDC``, ``AutoencoderKLHunyuanImage``, and of
``AsymmetricAutoencoderKL`` without a mask. In decoders of video and sound retroexit finds the stages itself.

- Shares in the printed table hold for latents of 16x16; pass `retroexit.wrap` ``example_inputs`` of another
  size to see the shares at that size.
- The decoder of ``AutoencoderTiny`` is 64 channels wide, the default of ``min_channels``: pass
  ``min_channels=16`` to `retroexit.wrap`.
- With ``enable_tiling``, every tile is routed separately.
- Put a pipeline on its device before you wrap its decoder. Its precision may change later: fit in float32,
  then ``pipe.to(torch.float16)`` and ``model.to(torch.float16)``, or convert the pipeline while the exits are
  in. The decoder of ``AsymmetricAutoencoderKL`` names its precision in its code; wrap that again.
"""

from __future__ import annotations

from retroexit_diffusers.pipeline import EarlyExitDecoder, early_exits, gather_latents
from retroexit_diffusers.plugin import retroexit_describe

__all__ = ["EarlyExitDecoder", "early_exits", "gather_latents", "retroexit_describe"]
