"""A vision-language model of 140 M parameters out of packages: EfficientNet-Lite0, a projector and SmolLM2-135M-Instruct.

Tower and language model are as published. No package has a projector between them, so one is fitted here, in seconds: an
image's features come to lie where the language model keeps the words for what is seen.
"""

import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, FastVlmConfig, FastVlmForConditionalGeneration, LlavaProcessor

from tests.real.shapes import pictures
from tests.real.tokenizers import real_tokenizer
from tests.real.towers import EFFICIENTNET_PIXELS, image_classifier, language_model
from tests.real.wheels import built

SIDE = 128
STRIDE = 32
FITTED_PICTURES = 600
FITTING_STEPS = 150


def real_vlm() -> Path:
    """The folder of the model in bfloat16 and its processor; made once, and kept beside the wheels."""
    return built("smollm2-efficientnet", _save)


def _save(folder: Path) -> None:
    torch.manual_seed(0)
    processor = _processor()
    language, _ = language_model()
    language.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    tower = image_classifier().efficientnet
    tower.config.update({"image_size": SIDE, "hidden_size": tower.config.hidden_dim})
    config = FastVlmConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=processor.image_token_id,
        image_seq_length=(SIDE // STRIDE) ** 2,
        tie_word_embeddings=True,
    )
    model = FastVlmForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    _fit_projector(model.model, processor)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def _processor() -> Any:
    images = CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False, **EFFICIENTNET_PIXELS)
    tokenizer = real_tokenizer("smollm2")
    return LlavaProcessor(
        images, tokenizer, patch_size=STRIDE, vision_feature_select_strategy="full", chat_template=tokenizer.chat_template
    )


def _fit_projector(model: Any, processor: Any) -> None:
    """Least squares between the mean of an image's projected features and the sum of the embeddings of its colour and shape."""
    labels = random.Random(0).sample(list(pictures("train").items()), FITTED_PICTURES)
    maps = torch.cat([_features(model, processor, [path for path, _ in labels[i : i + 50]]) for i in range(0, len(labels), 50)])
    words = torch.stack([sum(_embedding(model, processor.tokenizer, word) for word in described) for _, described in labels])
    projector: nn.Module = model.multi_modal_projector
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3)
    for _ in range(FITTING_STEPS):
        drawn = torch.randint(len(labels), (64,))
        loss = (projector(maps[drawn]).mean(1) - words[drawn]).square().mean() / words.var()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def _features(model: Any, processor: Any, paths: list[Path]) -> Tensor:
    """[images, places, channels] of the vision tower."""
    pixels = processor.image_processor([Image.open(path).convert("RGB") for path in paths], return_tensors="pt")["pixel_values"]
    return model.vision_tower(pixels).last_hidden_state.flatten(2).transpose(1, 2)


@torch.no_grad()
def _embedding(model: Any, tokenizer: Any, word: str) -> Tensor:
    """[H]; the mean over the tokens of a word that has several."""
    ids = tokenizer(f" {word}", return_tensors="pt")["input_ids"][0]
    return model.get_input_embeddings()(ids).mean(0)
