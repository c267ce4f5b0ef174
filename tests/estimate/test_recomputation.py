"""--gradient_checkpointing auto in a run: as few layers as its workers' GPUs and its data demand."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rayalign.algorithms import SimPO
from rayalign.config.config import Config
from rayalign.config.sections import ModelConfig
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.prepare import RunData
from rayalign.data.store import EncodedPair, PreparedData
from rayalign.estimate.memory import GB, OVERHEAD_BYTES
from rayalign.estimate.recomputation import layers_to_recompute
from rayalign.models.source import ModelSource
from rayalign.training.ready import settle_recomputation
from tests.tiny_models import encode_pair, make_policy, noise_image

TEXT = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "vocab_size": 2000}


def test_a_run_recomputes_as_few_layers_as_its_gpus_and_data_demand(
    model_folder: Callable[..., Path], prepare_pairs: Callable[[Sequence[EncodedPair]], PreparedData]
) -> None:
    folder = model_folder("llava", **TEXT)
    config = Config(SimPO(), model=ModelConfig(gradient_checkpointing="auto"))
    short = encode_pair(folder, "a", "It?", "yes", "no", images=[noise_image(30, 30)])
    long = encode_pair(folder, "b", "Which digit is it? " * 60, "The digit is two. " * 30, "A cat sits on the mat. " * 30)
    spec = EncoderSpec(str(folder), "both")
    of_short, of_both = (
        RunData(ModelSource(str(folder)), spec, prepare_pairs(pairs), None) for pairs in ([short], [short, long])
    )
    sizes = [round((OVERHEAD_BYTES + mib * 2**20) / 0.9) for mib in (10, 17, 40)]
    assert [layers_to_recompute(config, of_both, size) for size in sizes] == [4, 2, 0]
    assert layers_to_recompute(config, of_short, sizes[0]) == 0

    policy = make_policy(folder, model=config.model, needs=config.algorithm.needs)
    layers = policy.base.get_decoder().layers
    said = settle_recomputation(policy, config, of_both, gpu_bytes=None, rank=0)
    assert said == "Gradient checkpointing: all 4 layers run again, since the memory of the workers' devices is not known"
    assert [layer.gradient_checkpointing for layer in layers] == [True] * 4
    size = sizes[1]
    said = settle_recomputation(policy, config, of_both, gpu_bytes=size, rank=0)
    assert said == f"Gradient checkpointing: 2 of 4 layers run again, as few as fit {size / GB:.1f} GB"
    assert [layer.gradient_checkpointing for layer in layers] == [True, True, False, False]
