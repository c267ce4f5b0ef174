"""What stands for a picture, a video or a sound in the texts of other tools and models; ours for a picture is `<image>`."""

import re

IMAGE_PLACEHOLDER = re.compile(
    r"<(?:"
    r"\|vision_start\|><\|image_pad\|>(?:<\|vision_end\|>)?|\|image_pad\|>"
    r"|(?:\|begin_of_image\|><)?\|image[ _-]?\d*\|>(?:<\|end_of_image\|>)?"
    r"|(?:img><)?IMG_CONTEXT>(?:</img>)?"
    r"|(?i:image)(?:[ _-]?\d+| ?/)>"
    r"|(?i:image)[ _-]?(?i:here|pad|placeholder|soft_token|token)>"
    r"|start_of_image>"
    r"|(?:Image|IMAGE)>"
    r")|\[IMG\](?!\s*https?:)"  # else a forum's picture
)
"""Those of Qwen, Phi, Llama and GLM, InternVL, MMMU, DeepSeek and InternLM, Gemma, and Pixtral. HTML and Markdown are no such
thing: a question may be about them."""

VIDEO_OR_AUDIO_PLACEHOLDER = re.compile(r"<\|?(?i:video|audio)(?:[ _-]?(?i:\d+|bos|pad|placeholder))?\|?>")


def with_marks(texts: list[str], mark: str, num_images: int) -> list[str] | None:
    """The texts with a mark in place of each of their placeholders; None where these aren't as many as the images, of one kind,
    and numbered, if at all, in the order of the images."""
    found = [placeholder for text in texts for placeholder in IMAGE_PLACEHOLDER.findall(text)]
    kinds = {re.sub(r"\d+", "", placeholder) for placeholder in found}
    numbers = [int(number) for placeholder in found for number in re.findall(r"\d+", placeholder)]
    in_order = not numbers or (numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(found))))
    if len(found) != num_images or len(kinds) != 1 or not in_order:
        return None
    return [IMAGE_PLACEHOLDER.sub(mark, text) for text in texts]
