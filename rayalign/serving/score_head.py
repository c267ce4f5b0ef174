"""What a reward model needs in the hands of others: a padding token that no score is read at, and a word on a head's bias."""

import logging
from typing import Any

logger = logging.getLogger(__name__)


def warn_of_bias(bias: float, *helps: str) -> None:
    """Says what becomes of a value head's bias, which a `score` layer has no place for; `helps`: what adds it again."""
    if bias != 0:
        logger.warning(
            "The value head has a bias of %.9g, which this form has no place for: scores will be lower by it (higher, where it "
            "is negative), their order stays. %s",
            bias,
            " ".join(helps),
        )


def set_pad_token(config: Any, tokenizer: Any) -> None:
    """Makes tokenizer and config agree on a padding token that no response ends with: the score is read at the last token that
    is no padding, and were the end mark itself the padding, it would be read one token early.

    Where the tokenizer has no such token, there is no padding token: then a batch holds one row.
    """
    text_config = config.get_text_config()
    token = _pad_token(tokenizer, text_config.vocab_size, getattr(config, "image_token_id", None))
    if token is None:
        logger.warning("The tokenizer has no token that could serve as padding beside its end mark: score rows one at a time.")
    else:
        tokenizer.pad_token = token
    for part in (config, text_config):
        part.pad_token_id = None if token is None else tokenizer.convert_tokens_to_ids(token)


def _pad_token(tokenizer: Any, vocab_size: int, image_token_id: int | None) -> str | None:
    special = {id: str(token) for id, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special}
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id, image_token_id}
    free = {id: token for id, token in special.items() if id not in taken and id < vocab_size}
    if tokenizer.pad_token_id in free:
        return str(tokenizer.pad_token)
    return next((token for kind in ("pad", "unk", "reserved") for token in free.values() if kind in token.lower()), None)
