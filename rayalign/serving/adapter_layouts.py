"""A run's adapter as other tools keep one, not merged: peft's folder, which TRL and ms-swift load onto the base model.

Of a policy, of any algorithm, mDPO among them, that is what a run writes itself. A reward model differs: TRL (1.16,
trainer/reward_trainer.py) and ms-swift from 3.1 on (swift/llm/model/patcher.py) have a sequence classifier with a `score`
layer, which the adapter brings among its `modules_to_save` (ms-swift names v_head there, and peft adds `score` by itself).
Up to 3.0 ms-swift kept the head as LLaMA-Factory does, in a file of its own beside the adapter (swift/trainers/mixin.py:
value_head.safetensors, or value_head.bin, with v_head.summary.weight [1, H] and v_head.summary.bias [1]): the form of a run's
model/, which `score` and every other verb read from there, too.

ms-swift finds the base model, and that it is a classifier, in args.json beside the adapter
(swift/llm/argument/base_args/base_args.py, `load_args_from_ckpt`), and takes what is not in there from its own flags.
"""

import json
from pathlib import Path
from typing import Literal

from peft.utils import load_peft_weights
from safetensors.torch import save_file

from rayalign.models.processors import tokenizer_of
from rayalign.models.registry import load_config
from rayalign.models.source import ADAPTER_CONFIG, ModelSource, read_adapter_config
from rayalign.ops.value_head import find_value_head, load_value_head
from rayalign.serving.merge import processor_of
from rayalign.serving.score_head import set_pad_token, warn_of_bias

AdapterLayout = Literal["trl", "ms_swift"]
ADAPTER_LAYOUTS: tuple[AdapterLayout, ...] = ("trl", "ms_swift")

WEIGHTS, ARGUMENTS = "adapter_model.safetensors", "args.json"
SCORE = "base_model.model.score.weight"
"""The head among an adapter's tensors, by peft's name of it."""


def write_adapter(source: ModelSource, folder: Path, *, base: str, layout: AdapterLayout) -> None:
    """Writes an adapter with its processor into a folder, for a base model that is known to others as `base`."""
    assert source.adapter is not None
    adapter = Path(source.adapter)
    config = read_adapter_config(adapter)
    weights = load_peft_weights(str(adapter), device="cpu")
    processor = processor_of(source)
    is_reward_model = find_value_head(adapter) is not None
    if is_reward_model:
        base_config = load_config(source.base)
        head = load_value_head(adapter, base_config.get_text_config().hidden_size).summary
        warn_of_bias(head.bias.item())
        weights[SCORE] = head.weight.detach().clone()
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        set_pad_token(base_config, tokenizer_of(processor))
    processor.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if layout == "ms_swift":
        kind = {"task_type": "seq_cls", "num_labels": 1, "problem_type": "regression"}
        # 3 calls it train_type, 4 tuner_type; each takes what it knows.
        arguments = {
            "model": base,
            "train_type": "lora",
            "tuner_type": "lora",
            **(kind if is_reward_model else {"task_type": "causal_lm"}),
        }
        (folder / ARGUMENTS).write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")
