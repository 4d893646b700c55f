"""OASIS for retroexit: generator, discriminator and loss under the official names, and the plug-in.

Official checkpoints are plain state dicts; they are read without unpickling code and load strictly:

```python
generator = OASISGenerator.for_dataset("cityscapes")  # or "ade20k", "coco-stuff"
generator.load_state_dict(torch.load("best_EMA.pth", weights_only=True))
model = retroexit.wrap(generator.eval(), attach_at=[1, 2, 3, 4], scale=1 / 4)
image = model(one_hot(labels, generator.num_labels), exit=1)

discriminator = OASISDiscriminator.for_dataset("cityscapes")
discriminator.load_state_dict(torch.load("best_D.pth", weights_only=True))
```

Objects of the official code (``OASIS_Generator``) are recognised and wrapped as they are. Noise is drawn
inside ``forward``, once, whichever exit is taken; pass ``z`` to choose it (not with the official objects,
which ignore it).
"""

from __future__ import annotations

from retroexit_oasis.datasets import DATASETS, Dataset, one_hot
from retroexit_oasis.discriminator import DiscriminatorBlock, OASISDiscriminator
from retroexit_oasis.generator import OASISGenerator, SPADEBlock, SPADENorm
from retroexit_oasis.losses import class_weights, fake_loss, labelmix_loss, labelmix_mask, mix, real_loss
from retroexit_oasis.objective import OASISObjective
from retroexit_oasis.plugin import retroexit_build_stage, retroexit_describe

__all__ = [
    "DATASETS",
    "Dataset",
    "DiscriminatorBlock",
    "OASISDiscriminator",
    "OASISGenerator",
    "OASISObjective",
    "SPADEBlock",
    "SPADENorm",
    "class_weights",
    "fake_loss",
    "labelmix_loss",
    "labelmix_mask",
    "mix",
    "one_hot",
    "real_loss",
    "retroexit_build_stage",
    "retroexit_describe",
]
