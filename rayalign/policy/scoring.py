"""A trained model for use from Python: raw rows in, log-probabilities of their responses (or rewards) out, without a cluster.

Rows are read and encoded as they are for training, so that the numbers are those of the training's forward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rayalign.algorithms import Needs
from rayalign.config.sections import ModelConfig, TunerConfig
from rayalign.data.batch import PairBatch, assemble
from rayalign.data.encode import Encoder
from rayalign.data.encoder_spec import EncoderSpec, image_processing
from rayalign.data.rows import Sources, encode_record, record_of
from rayalign.formats.columns import parse_renames
from rayalign.formats.records import RecordError
from rayalign.models.registry import FAMILIES, REGISTERED_MODELS
from rayalign.models.source import require_model
from rayalign.ops.logprobs import PairLogps
from rayalign.ops.value_head import find_value_head
from rayalign.policy.forward_check import check_forward
from rayalign.policy.loading import load_policy
from rayalign.policy.policy import Policy
from rayalign.storage import Store

NO_LIMIT = 2**20
"""Tokens of a row: more than any model takes."""


@dataclass(frozen=True)
class LoadedPolicy:
    """A model that is not trained, with what encodes rows for it: `policy` runs batches, `encoder` makes pairs of records.

    Rows are mappings in any record format of --dataset, with a response and, for pairs, a rejected one. Relative image paths
    start from `image_root`; `sources` says which columns are renamed. All rows of a call run as one batch.
    """

    policy: Policy
    encoder: Encoder
    image_root: Store
    sources: Sources

    def logps(self, rows: Sequence[Mapping[str, Any]]) -> PairLogps:
        """The responses' log-probabilities: `chosen.total` [B] is the sum over the response's tokens, `chosen.tokens` [B] their
        number, `chosen.average` [B] the mean; `rejected` likewise, with 0 tokens where a row has one response only.

        Raises ValueError that names the row for one that can't be used.
        """
        batch = self.batch(rows)
        with torch.no_grad():
            return self.policy.logps(batch, self.policy.image_features(batch))

    def rewards(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
        """A reward model's scores [B] of the chosen and [B] of the rejected responses.

        Raises ValueError for a model without a value head, and that names the row for one that is no pair.
        """
        if self.policy.value_head is None:
            raise ValueError("The model has no value head, so it is no reward model. Load the model/ folder of a run of rm.")
        batch = self.batch(rows)
        if batch.response_ids.unique().numel() < 2 * batch.num_pairs:
            raise ValueError("Rewards are of pairs: give each row a rejected response, too.")
        with torch.no_grad():
            return self.policy.values(batch, self.policy.image_features(batch))

    def batch(self, rows: Sequence[Mapping[str, Any]]) -> PairBatch:
        """The rows as one batch on the model's device."""
        if not rows:
            raise ValueError("No rows given.")
        pairs = []
        for number, row in enumerate(rows):
            try:
                record = record_of(row, id=str(number), sources=self.sources, spec=self.encoder.spec)
                encoded = encode_record(record, folder=self.image_root, sources=self.sources, encoder=self.encoder)
                pairs.append(encoded.pair)
            except RecordError as error:
                raise ValueError(f"Row {number}: {error}") from None
        spec = self.encoder.spec
        return assemble(pairs, layout=spec.layout, process_images=image_processing(spec)).to(self.policy.device)


def load_for_scoring(
    model: str,
    *,
    device: str | torch.device | None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"],
    image_root: str,
    columns: Sequence[str],
    max_pixels: int | None,
    trust_remote_code: bool,
) -> LoadedPolicy:
    """`rayalign.load_policy`, which documents it."""
    sources = Sources((), image_root=None, allow_image_urls=False, columns=parse_renames(columns))
    place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    flags = ModelConfig(model=model, dtype=dtype, gradient_checkpointing=False, trust_remote_code=trust_remote_code)
    source = require_model(flags, REGISTERED_MODELS).here()
    head = find_value_head(Path(source.adapter or source.base))
    # A model without an adapter gets a new one, which adds 0: full tuning would keep its weights in float32.
    needs = Needs(head="value" if head else "language")
    policy = load_policy(source, model=flags, tuner=TunerConfig(), device=place, needs=needs)
    spec = EncoderSpec(source.base, "both", max_length=NO_LIMIT, max_pixels=max_pixels, trust_remote_code=trust_remote_code)
    encoder = Encoder(spec)
    if policy.family.model_type not in FAMILIES:
        check_forward(policy, spec)
    for parameter in policy.trainable.values():
        parameter.requires_grad_(False)
    return LoadedPolicy(policy, encoder, Store.at(image_root), sources)
