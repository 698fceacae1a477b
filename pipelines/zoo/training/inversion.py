"""A textual inversion: one vector that CLIP reads in the place of a word, learned from pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from pipelines.zoo import world
from pipelines.zoo.training import autoencoder, stable_diffusion, text
from pipelines.zoo.training.loop import Draw, Job, Report, fit

TOKEN = "<plum>"
SHOWN = {"colour": "purple", "shape": "triangle"}  # what the word comes to mean
_STAND_IN = "shape"
_SCENES = 64


def train(
    unet: Any, clip: Any, vae: Any, steps: int, folder: Path, report: Report, device: str
) -> nn.Parameter:
    """The vector for TOKEN, [1, width]."""
    unet.requires_grad_(False)
    clip = clip.to(device).requires_grad_(False)
    tokenizer = text.clip_tokenizer()
    rng = np.random.default_rng(15)
    scenes = [world.scene(rng, **SHOWN) for _ in range(_SCENES)]
    latents = autoencoder.encode(vae, np.stack([world.draw(each) for each in scenes]), device)
    texts = [f"a {_STAND_IN} on a {each.background} background" for each in scenes]
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
    [stand_in] = tokenizer(_STAND_IN, add_special_tokens=False).input_ids
    silence = torch.zeros(len(scenes), text.WIDTH, device=device)
    word = nn.ParameterDict({"vector": clip.get_input_embeddings().weight[stand_in][None].clone()})
    table = clip.get_input_embeddings()

    def loss(draw: Draw) -> Tensor:
        taught = table.register_forward_hook(
            lambda layer, inputs, output: torch.where(
                (inputs[0] == stand_in)[..., None], word["vector"][0], output
            )
        )
        try:
            said = stable_diffusion.Said(clip(ids).last_hidden_state, silence)
        finally:
            taught.remove()
        lesson = stable_diffusion.Lesson("sd15", None, latents, said, said[-1:], 1)
        each = stable_diffusion.case(lesson, draw, count=16, unsaid=0)
        return mse_loss(stable_diffusion.predict(unet, "sd15", each.noisy, each.time, each.said), each.target)

    trained = fit(Job("word", word, loss, steps, muon=0.02, warm_up=10), folder, report, device)
    vector = trained.get_parameter("vector")
    return vector


def save(vector: Tensor, file: Path) -> None:
    save_file({"emb_params": vector.detach().half().cpu().contiguous()}, file)
