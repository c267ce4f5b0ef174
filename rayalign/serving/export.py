"""The result of a run as one plain folder, which loads without peft: its adapter merged, a reward model's head as `score`.

`policy` saves an adapter (or weights), and for a reward model a value head beside it. `merge` writes the first; here a reward
model becomes one with `score.weight` [1, H], the layout of transformers' `...ForSequenceClassification` classes, which
transformers, ms-swift and vLLM load.
"""

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from rayalign.config.sections import ModelConfig
from rayalign.config.serving import ExportConfig
from rayalign.models.compat import headless_class
from rayalign.models.processors import tokenizer_of
from rayalign.models.registry import REGISTERED_MODELS, find_family, load_config
from rayalign.models.source import ModelSource, require_model
from rayalign.ops.value_head import find_value_head, load_value_head
from rayalign.policy.adapters import merge_adapter
from rayalign.policy.compat import keep_weight_names
from rayalign.policy.weights import load_weights
from rayalign.serving.adapter_layouts import ADAPTER_LAYOUTS, write_adapter
from rayalign.serving.export_folder import check_apart, check_empty
from rayalign.serving.merge import processor_of, write_merged
from rayalign.serving.model_card import is_export, write_card
from rayalign.serving.score_head import set_pad_token, warn_of_bias
from rayalign.storage import Store

logger = logging.getLogger(__name__)

LABEL = "reward"


def run(config: ExportConfig) -> Store:
    """Writes the model of `config.model`, a reward model in sequence-classification form, and returns its folder.

    Raises ValueError where there is neither an adapter to merge nor a value head, and where the folder holds anything that must
    not be overwritten.
    """
    if not config.model or not config.output_dir:
        raise ValueError("Pass --model with the model/ folder of a run, and --output_dir with a new folder.")
    output, model = Store.at(config.output_dir), Store.at(config.model)
    check_apart(output, {config.model: "the model that is exported"})
    check_empty(output, overwrite=config.overwrite, is_export=is_export(output))
    with tempfile.TemporaryDirectory() as temporary:
        named = require_model(ModelConfig(model=config.model), REGISTERED_MODELS)
        check_apart(output, {named.adapter: "the model that is exported", named.base: f"its base model, {named.base}"})
        source = named.here()
        folder = Path(temporary) / "export"
        head = find_value_head(Path(source.adapter or source.base))
        if config.layout == "trl" or config.layout == "ms_swift":  # the type checker reads it
            _require_adapter(config, source)
            write_adapter(source, folder, base=named.base, layout=config.layout)
            form = f"The adapter in the form of {config.layout}"
        elif head is not None and config.layout == "value_head":
            _require_adapter(config, source)
            write_merged(source, folder, needs_output_head=False)
            shutil.copy(head, folder)
            form = "The reward model with its adapter merged and its value head"
        elif head is not None and config.layout != "value_head":
            write_sequence_classifier(source, folder, layout=config.layout)
            form = "The reward model in sequence-classification form"
        else:
            _check_merge(config, source)
            write_merged(source, folder)
            form = "The model with its adapter merged"
        write_card(folder, name=output.name, base=named.base, model=model)
        output.delete()
        output.upload(folder)
    logger.info("%s is in %s", form, output.location)
    return output


def _check_merge(config: ExportConfig, source: ModelSource) -> None:
    _require_adapter(config, source)
    if config.layout != "transformers":
        raise ValueError(
            f"--layout {config.layout}: names the head of a reward model, and {config.model} has none. Leave it out."
        )


def _require_adapter(config: ExportConfig, source: ModelSource) -> None:
    if source.adapter is None and config.layout in ADAPTER_LAYOUTS:
        raise ValueError(f"--layout {config.layout}: is of an adapter, and {config.model} has none. Leave it out.")
    if source.adapter is None and config.layout == "value_head":
        raise ValueError(f"--layout value_head: {config.model} has no adapter to merge, and is of that form already: copy it.")
    if source.adapter is None:
        raise ValueError(
            f"--model {config.model}: has neither an adapter, which could be merged, nor a value head "
            "(value_head.safetensors or value_head.bin), as reward models have. It is a plain model already: copy it, or give "
            "the model/ folder of a run."
        )


def write_sequence_classifier(
    source: ModelSource, folder: Path, *, layout: Literal["transformers", "vllm"] = "transformers", max_shard_size: str = "5GB"
) -> None:
    """Writes the merged weights with their head, the config and the processor into a folder."""
    family = find_family(load_config(source.base).model_type)
    base: Any = load_weights(family.auto_class, source.base, needs_output_head=False, dtype="auto")
    if source.adapter:
        base = merge_adapter(base, source.adapter)
    config = base.config
    head = load_value_head(Path(source.adapter or source.base), config.get_text_config().hidden_size).summary
    processor = processor_of(source)
    _set_classifier_config(config, bias=head.bias.item())
    set_pad_token(config, tokenizer_of(processor))
    classifier = _assemble(base, head.weight)
    if layout == "vllm" and not family.text_only:  # of one part alone, the head is `score` there, too
        _save_for_vllm(classifier, folder, max_shard_size)
    else:
        classifier.save_pretrained(folder, max_shard_size=max_shard_size)
    processor.save_pretrained(folder)


def load_sequence_classifier(folder: str | Path, **options: Any) -> Any:
    """Loads an exported model with transformers; `model(**processor(...)).logits` [B, 1] are the scores, in float32.

    `options` are those of `from_pretrained`. Raises ValueError for weights without a head.
    """
    config = AutoConfig.from_pretrained(folder)
    model_class: Any = sequence_classifier_class(config)
    model, report = model_class.from_pretrained(folder, config=config, output_loading_info=True, **options)
    if report["missing_keys"]:
        raise ValueError(
            f"{folder}: lacks the weights {', '.join(sorted(report['missing_keys']))}. Give the folder that "
            "export wrote with --layout transformers."
        )
    bias = config.to_dict().get("score_bias")
    if bias is not None:
        model.score.bias = nn.Parameter(model.score.weight.new_full((1,), bias), requires_grad=False)
    return model


class _Scorer(GenericForSequenceClassification):
    """As in training, the head is float32 and reads float32 states, whatever the type of the other weights.

    The class below it is not documented, and the name of the types to keep is private; both in
    https://github.com/huggingface/transformers/tree/v5.23.0/src/transformers (modeling_layers.py, modeling_utils.py), 5.23.0.
    """

    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {"score"}

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[no-untyped-call]  # transformers is typed in parts only
        self.score.register_forward_pre_hook(lambda module, states: (states[0].float(),))


def sequence_classifier_class(config: Any) -> type[PreTrainedModel]:
    """`LlavaForSequenceClassification` and the like: parts that transformers has and puts together for few models only, as in
    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/llama/modeling_llama.py, 5.23.0.

    It can go for a model that AutoModelForSequenceClassification knows by itself.
    """
    model_class: Any = headless_class(config)
    pretrained = next(parent for parent in model_class.__mro__ if PreTrainedModel in parent.__bases__)
    name = f"{model_class.__name__.removesuffix('Model')}ForSequenceClassification"
    # transformers translates the names of weights on disk for classes of its own modules only.
    return type(name, (_Scorer, pretrained), {"__module__": pretrained.__module__})


def _assemble(base: Any, weight: torch.Tensor) -> Any:
    """The classifier made of a generating model's parts; it shares their memory."""
    model_class: Any = sequence_classifier_class(base.config)
    with torch.device("meta"):
        classifier = model_class(base.config)
    classifier.model = base.model
    classifier.score = nn.Linear(weight.shape[1], 1, bias=False)
    classifier.score.weight = nn.Parameter(weight.detach().clone())
    keep_weight_names(classifier, base)
    return classifier


def _set_classifier_config(config: Any, *, bias: float) -> None:
    # vLLM builds the head of a model of several parts from the text part's config.
    for part in (config, config.get_text_config()):
        part.id2label, part.label2id = {0: LABEL}, {LABEL: 0}
        part.problem_type = "regression"  # vLLM would pass the score through a sigmoid otherwise
    if bias != 0:
        config.score_bias = bias
        warn_of_bias(
            bias, "load_sequence_classifier adds it from config.json; for vLLM pass PoolerConfig(logit_mean=%.9g)." % -bias
        )


def _save_for_vllm(classifier: Any, folder: Path, max_shard_size: str) -> None:
    """vLLM puts the head of a model of several parts on its language model, and takes it by that name only (0.33). transformers
    would rename it on saving, so it goes into a file of its own."""
    weights = classifier.state_dict()
    head = {"language_model.score.weight": weights.pop("score.weight")}
    classifier.save_pretrained(folder, state_dict=weights, max_shard_size=max_shard_size)
    save_file(head, folder / "score.safetensors", metadata={"format": "pt"})
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.exists():  # then only the files it names are read
        shards = json.loads(index.read_text())
        shards["weight_map"] |= dict.fromkeys(head, "score.safetensors")
        index.write_text(json.dumps(shards, indent=2) + "\n")
