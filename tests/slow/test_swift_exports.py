"""What ms-swift makes of our exports: the logits and scores of the model they came from.

SWIFT_PYTHON names the Python of an environment that has ms-swift; benchmarks/swift_step.py says how to make one.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rayalign.algorithms import Needs
from rayalign.config.sections import ModelConfig, TunerConfig
from rayalign.config.serving import ExportConfig
from rayalign.data.batch import PairBatch
from rayalign.policy.policy import Policy
from rayalign.policy.saving import save_policy
from rayalign.serving.export import run
from tests.tiny_models import encode_pair, make_batch, make_policy, noise_image, wake_adapters

PYTHON = os.environ.get("SWIFT_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="SWIFT_PYTHON names no environment with ms-swift")

LOADS = """
import sys, torch
from swift.arguments import InferArguments
from swift.pipelines.utils import prepare_model_template

given = torch.load(sys.argv[1], weights_only=False)
common = {"use_hf": True, "torch_dtype": "float32", "attn_impl": "sdpa", "model_type": "llava1_6_mistral_hf"}
model, _ = prepare_model_template(InferArguments(**common, **given["flags"]))
with torch.no_grad():
    torch.save(model.eval()(**given["inputs"]).logits.float(), sys.argv[2])
"""


def in_swift(inputs: dict[str, Any], folder: Path, **flags: Any) -> torch.Tensor:
    """What ms-swift's model gives for some inputs."""
    given, found = folder / "given.pt", folder / "found.pt"
    torch.save({"inputs": inputs, "flags": flags}, given)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(PYTHON), "-c", LOADS, str(given), str(found)]
    done = subprocess.run(command, env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: torch.Tensor = torch.load(found)
    return result


@pytest.mark.parametrize("head", ["language", "value"])
def test_ms_swift_gives_the_numbers_of_the_trained_model(model_folder: Callable[..., Path], tmp_path: Path, head: Any) -> None:
    base, trained = model_folder("llava_next"), tmp_path / "trained"
    policy = wake_adapters(
        make_policy(
            base,
            needs=Needs(head=head),
            model=ModelConfig(dtype="float32", gradient_checkpointing=False),
            tuner=TunerConfig(lora_target_modules=("ALL",)),
        )
    )
    if policy.value_head is not None:
        torch.nn.init.normal_(policy.value_head.summary.weight)
        torch.nn.init.zeros_(policy.value_head.summary.bias)
    save_policy(policy, trained)
    pair = encode_pair(base, "a", "Which?", "a cat", "a dog", images=[noise_image(40, 30)])
    batch = make_batch(base, [pair], needs=Needs(responses="chosen"))
    expected = numbers_of(policy, batch)
    inputs = {"input_ids": batch.input_ids, **batch.image_inputs}
    kind = {"task_type": "seq_cls", "num_labels": 1, "problem_type": "regression"} if head == "value" else {}
    for layout, flags in (("ms_swift", {}), ("transformers", kind)):
        output = tmp_path / layout
        run(ExportConfig(model=str(trained), output_dir=str(output), layout=layout))  # type: ignore[arg-type]  # a literal
        named = {"adapters": [str(output)]} if layout == "ms_swift" else {"model": str(output)}
        torch.testing.assert_close(in_swift(inputs, tmp_path, **named, **flags), expected, atol=1e-5, rtol=0)


def numbers_of(policy: Policy, batch: PairBatch) -> torch.Tensor:
    """A row's logits, or its score."""
    policy.model.eval()
    with torch.no_grad():
        inner: Any = policy.base.model(input_ids=batch.input_ids, **batch.image_inputs)
        states = inner.last_hidden_state
        if policy.value_head is not None:
            return policy.value_head.summary(states[:, -1].float())
        return policy.base.get_output_embeddings()(states).float()
