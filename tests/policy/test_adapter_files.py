"""An adapter is loaded whole or refused: folders damaged in many ways, and names of older versions of transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import rayalign
from rayalign.algorithms import SFT
from rayalign.config.sections import ModelConfig, TunerConfig
from rayalign.models.registry import REGISTERED_MODELS
from rayalign.models.source import ModelSource, resolve_model
from rayalign.policy.adapter_files import read_adapter
from rayalign.policy.policy import Policy
from rayalign.policy.prepare import prepare_model
from rayalign.policy.saving import save_policy
from tests.tiny_models import (
    BOTH,
    REFERRED,
    encode_pair,
    find_family,
    make_batch,
    make_model,
    make_policy,
    noise_image,
    peft_adapter,
)

WHOLE: Any = {"lora_target_modules": ("ALL",), "freeze_vit": False, "freeze_aligner": False}
RED = noise_image(40, 30, seed=1)

OLD_NAMES = {
    "qwen2_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
    "llava": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
}
"""What transformers called the parts before 4.52."""


def make_adapter(model: Path, folder: Path, **tuner: Any) -> Path:
    policy = make_policy(model, tuner=TunerConfig(**{**WHOLE, "lora_rank": 4, **tuner}))
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_policy(policy, folder)
    return folder


@pytest.fixture(scope="module")
def llava(model_folder: Callable[..., Path]) -> Path:
    return model_folder("llava")


@pytest.fixture(scope="module")
def sound(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(llava, tmp_path_factory.mktemp("sound"))


@pytest.fixture
def adapter(sound: Path, tmp_path: Path) -> Path:
    """A sound adapter that a test may damage."""
    return Path(shutil.copytree(sound, tmp_path / "adapter"))


def tensors(adapter: Path) -> dict[str, Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def write(adapter: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


def set_config(adapter: Path, **values: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def with_old_names(adapter: Path, family: str) -> None:
    def old(name: str) -> str:
        for new, before in OLD_NAMES[family].items():
            for prefix in ("base_model.model.", ""):
                if name.startswith(prefix + new):
                    return prefix + before + name.removeprefix(prefix + new)
        return name

    write(adapter, {old(name): value for name, value in tensors(adapter).items()})
    config = json.loads((adapter / "adapter_config.json").read_text())
    set_config(
        adapter,
        target_modules=[old(name) for name in config["target_modules"]],
        alpha_pattern={old(name): alpha for name, alpha in config["alpha_pattern"].items()},
    )


def logps(policy: Policy, folder: Path) -> Tensor:
    pairs = [
        encode_pair(folder, "one", "Which digit is it?", "The digit is two.", "a cat", images=[RED]),
        encode_pair(folder, "none", "two?", "A cat sits on the mat.", "yes"),
    ]
    batch = make_batch(folder, pairs)
    with torch.no_grad():
        both = policy.logps(batch, policy.image_features(batch))
    return torch.cat([both.chosen.total, both.rejected.total])


def complaint(base: Path, adapter: Path, **tuner: Any) -> str:
    with pytest.raises(ValueError) as caught:
        make_policy(ModelSource(str(base), str(adapter)), tuner=TunerConfig(**tuner), needs=REFERRED)
    return str(caught.value)


END = (
    ". An adapter is loaded whole or not at all: give the model that it was trained on, or copy the adapter's folder again "
    "from where it was made."
)
A_MATRIX = "base_model.model.model.language_model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.mark.parametrize("tuner", [{}, {"stack_adapter": True}, {"sft_type": "full"}], ids=["go on", "stack", "merge"])
def test_an_adapter_with_half_its_matrices_is_refused_with_names(llava: Path, adapter: Path, tuner: dict[str, Any]) -> None:
    write(adapter, {name: value for name, value in tensors(adapter).items() if ".layers.0." in name})
    assert complaint(llava, adapter, **tuner) == (
        f"{adapter}/adapter_model.safetensors: does not fit the model {llava}; it lacks 30 tensors that its config asks for: "
        "base_model.model.model.language_model.layers.1.mlp.down_proj.lora_A.weight, "
        "base_model.model.model.language_model.layers.1.mlp.down_proj.lora_B.weight, "
        f"base_model.model.model.language_model.layers.1.mlp.gate_proj.lora_A.weight and 27 more{END}"
    )


def test_an_adapter_of_other_shapes_is_refused_with_both_shapes(llava: Path, adapter: Path) -> None:
    weights = tensors(adapter)
    write(adapter, {**weights, A_MATRIX: weights[A_MATRIX][:, :100].contiguous()})
    assert complaint(llava, adapter) == (
        f"{adapter}/adapter_model.safetensors: does not fit the model {llava}; 1 tensor of another shape: {A_MATRIX} is "
        f"[4, 100] and must be [4, 128]{END}"
    )


def test_a_tensor_that_the_model_has_no_place_for_is_refused(llava: Path, adapter: Path) -> None:
    extra = A_MATRIX.replace("layers.0", "layers.7")
    write(adapter, {**tensors(adapter), extra: torch.zeros(4, 128)})
    assert complaint(llava, adapter) == (
        f"{adapter}/adapter_model.safetensors: does not fit the model {llava}; it holds 1 tensor that the model has no place "
        f"for: {extra}{END}"
    )


def empty(adapter: Path) -> None:
    write(adapter, {})


def without_a_rank(adapter: Path) -> None:
    set_config(adapter, r=8)


def with_fewer_targets(adapter: Path) -> None:
    set_config(adapter, target_modules=["q_proj"])


def with_names_of_a_wrapper(adapter: Path) -> None:
    write(adapter, {name.replace("lora_A.", "lora_A.default."): value for name, value in tensors(adapter).items()})


def without_the_prefix(adapter: Path) -> None:
    write(adapter, {f"other.{name}": value for name, value in tensors(adapter).items()})


def with_dora_asked_for(adapter: Path) -> None:
    set_config(adapter, use_dora=True)


def with_weights_of_the_model(adapter: Path) -> None:
    write(adapter, {**tensors(adapter), "base_model.model.lm_head.weight": torch.zeros(600, 64)})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (empty, "it lacks 56 tensors that its config asks for"),
        (without_a_rank, "56 tensors of another shape"),
        (with_fewer_targets, "it holds 48 tensors that the model has no place for"),
        (with_names_of_a_wrapper, "it lacks 28 tensors that its config asks for"),
        (without_the_prefix, "it holds 56 tensors that the model has no place for"),
        (with_dora_asked_for, "it lacks 28 tensors that its config asks for"),
        (with_weights_of_the_model, "it holds 1 tensor that the model has no place for: base_model.model.lm_head.weight"),
    ],
)
def test_files_and_configs_that_contradict_each_other_are_refused(
    llava: Path, adapter: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(adapter)
    assert said in complaint(llava, adapter)


@pytest.mark.parametrize("other", ["other size", "other names", "fewer layers", "text"])
def test_an_adapter_of_another_base_model_is_refused(model_folder: Callable[..., Path], adapter: Path, other: str) -> None:
    base = {
        "other size": lambda: model_folder("llava", hidden_size=32, head_dim=8),
        "other names": lambda: model_folder("idefics3"),
        "fewer layers": lambda: model_folder("llava", num_hidden_layers=1),
        "text": lambda: model_folder("mistral"),
    }[other]()
    assert f"{adapter}/adapter_model.safetensors: does not fit the model {base}; " in complaint(base, adapter)


def test_target_modules_that_do_not_exist_are_refused(llava: Path, adapter: Path) -> None:
    set_config(adapter, target_modules=["no_such_proj"])
    said = complaint(llava, adapter)
    assert said.startswith(f"{adapter}/adapter_config.json: can't be followed on the model {llava}: ")
    assert "no_such_proj" in said


def test_missing_and_damaged_weights_are_told_with_their_file(llava: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert complaint(llava, adapter).startswith(f"{file}: is damaged or cut off (")
    file.unlink()
    assert complaint(llava, adapter) == (
        f"{adapter}: has neither adapter_model.safetensors nor adapter_model.bin, so there are no matrices to load. Copy the "
        "adapter's whole folder again from where it was made."
    )
    (adapter / "adapter_model.bin").write_bytes(b"no tensors")
    assert complaint(llava, adapter).startswith(f"{adapter}/adapter_model.bin: is damaged or cut off (")
    torch.save(["a list"], adapter / "adapter_model.bin")
    assert "it holds something else than named tensors" in complaint(llava, adapter)


def test_an_adapter_in_pytorch_s_own_format_loads_as_well(llava: Path, sound: Path, adapter: Path) -> None:
    torch.save(tensors(adapter), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    both = [logps(make_policy(ModelSource(str(llava), str(folder))), llava) for folder in (sound, adapter)]
    assert torch.equal(*both)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"peft_type": "LO', "is damaged or cut off ("),
        ("", "is damaged or cut off ("),
        ("[1]", "holds no settings of an adapter"),
        ('{"peft_type": "LORA", "r": 4}', "names no base model"),
        ('{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}', "is an adapter of the type PREFIX_TUNING"),
    ],
)
def test_a_damaged_config_is_told_with_its_file(adapter: Path, text: str, said: str) -> None:
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        resolve_model(ModelConfig(adapter=str(adapter)), REGISTERED_MODELS)
    assert str(caught.value).startswith(str(adapter))
    assert said in str(caught.value)


def test_an_ia3_adapter_is_refused(llava: Path, tmp_path: Path) -> None:
    get_peft_model(make_model("mistral"), IA3Config(task_type="CAUSAL_LM")).save_pretrained(str(tmp_path))
    assert complaint(llava, tmp_path) == (
        f"{tmp_path}: is an adapter of the type IA3, and only LoRA is supported. Merge it into its model first."
    )


def test_settings_that_peft_can_t_use_are_told_with_their_file(llava: Path, adapter: Path) -> None:
    for values in ({"r": -1}, {"r": "four"}):
        set_config(adapter, **values)
        assert complaint(llava, adapter).startswith(f"{adapter}/adapter_config.json: ")


@pytest.mark.parametrize("tuner", [{}, {"stack_adapter": True}, {"sft_type": "full"}], ids=["go on", "stack", "merge"])
@pytest.mark.parametrize("family", OLD_NAMES)
def test_names_of_before_transformers_4_52_are_mapped_and_that_is_said_once(
    model_folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str, tuner: dict[str, Any]
) -> None:
    folder = model_folder(family)
    adapter = make_adapter(folder, tmp_path / "adapter")
    # A scale of one layer's own, which must still be that layer's.
    set_config(adapter, alpha_pattern={"model.language_model.layers.1.self_attn.q_proj": 20})

    def loaded() -> Policy:
        return make_policy(ModelSource(str(folder), str(adapter)), tuner=TunerConfig(**tuner), needs=REFERRED)

    expected = logps(loaded(), folder)
    assert not caplog.records
    with_old_names(adapter, family)
    again = loaded()
    assert torch.equal(logps(again, folder), expected)
    assert (logps(make_policy(folder), folder) - expected).abs().min() > 1e-3
    said = [record.getMessage() for record in caplog.records if record.name == "rayalign.policy.adapter_files"]
    assert len(said) == 1
    assert said[0].startswith(f"{adapter}/adapter_model.safetensors: has module names of an older version of transformers; ")
    assert {"qwen2_vl": "model.layers is now model.language_model.layers", "llava": "language_model.model.layers is now"}[
        family
    ] in said[0]
    save_policy(again, tmp_path / "saved")
    if "sft_type" not in tuner:
        saved = make_policy(ModelSource(str(folder), str(tmp_path / "saved")))
        # A stack is saved as one adapter, which sums in another order: float32.
        torch.testing.assert_close(logps(saved, folder), expected, atol=0, rtol=1e-5 if tuner else 0)
        assert len(caplog.records) == 1


@pytest.mark.parametrize("stack", [False, True])
def test_an_adapter_on_the_output_head_is_refused(llava: Path, tmp_path: Path, stack: bool) -> None:
    """Whose weight alone the log-probs are made of."""
    adapter = peft_adapter(llava, tmp_path / "adapter", ["q_proj", "lm_head"])
    assert complaint(llava, adapter, stack_adapter=stack) == (
        f"{adapter}: the adapter stands on the output head, too, whose weight is read apart from its layer here, so it would "
        f"be left out. Merge it into its model first (rayalign export --model {adapter}), and go on from that."
    )
    make_policy(ModelSource(str(llava), str(adapter)), tuner=TunerConfig(sft_type="full"))


@pytest.mark.parametrize("targets", ["old names", ["q_proj"], r"^model\.layers.*\.q_proj$", "all-linear"])
def test_old_names_do_not_hide_that_matrices_are_missing(
    model_folder: Callable[..., Path], tmp_path: Path, targets: Any
) -> None:
    folder = model_folder("qwen2_vl")
    adapter = make_adapter(folder, tmp_path / "adapter", lora_target_modules=("q_proj",), freeze_vit=True, freeze_aligner=True)
    with_old_names(adapter, "qwen2_vl")
    if targets != "old names":
        set_config(adapter, target_modules=targets)
    whole = tensors(adapter)
    if targets != "all-linear":
        make_policy(ModelSource(str(folder), str(adapter)))
    write(adapter, {name: value for name, value in whole.items() if ".layers.0." in name})
    said = complaint(folder, adapter)
    assert "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_A.weight" in said or targets == "all-linear"
    assert "that its config asks for" in said


def test_an_adapter_with_the_same_layer_under_an_old_and_a_new_name_is_refused(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = model_folder("qwen2_vl")
    adapter = make_adapter(folder, tmp_path / "adapter")
    new = tensors(adapter)
    with_old_names(adapter, "qwen2_vl")
    write(adapter, {**tensors(adapter), **new})
    assert "that the model has no place for" in complaint(folder, adapter)


def test_old_names_are_mapped_where_a_policy_is_loaded_for_scoring(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_folder("qwen2_vl")
    adapter = make_adapter(folder, tmp_path / "adapter")
    rows = [
        {
            "messages": [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "A cat."}],
            "rejected_response": "no",
        }
    ]
    expected = rayalign.load_policy(str(adapter), device="cpu").logps(rows)
    with_old_names(adapter, "qwen2_vl")
    assert rayalign.load_policy(str(adapter), device="cpu").logps(rows) == expected
    write(adapter, dict(list(tensors(adapter).items())[:3]))
    with pytest.raises(ValueError, match="that its config asks for"):
        rayalign.load_policy(str(adapter), device="cpu")


def test_an_estimate_of_fewer_layers_takes_the_adapter_of_all_layers(llava: Path, sound: Path) -> None:
    family = find_family("llava")
    with torch.device("meta"):
        base: Any = family.auto_class.from_config(make_model("llava", text={"num_hidden_layers": 1}).config)
        assert len(read_adapter(base, str(sound)).shapes) == 56
        source, config = ModelSource(str(llava), str(sound)), ModelConfig(gradient_checkpointing=False)
        prepare_model(base, source, model=config, tuner=TunerConfig(), family=family, needs=BOTH, dtype=torch.float32)


def test_embeddings_saved_beside_their_adapter_are_taken_where_they_are_the_model_s_own(llava: Path, tmp_path: Path) -> None:
    base = find_family("llava").auto_class.from_pretrained(llava)
    get_peft_model(base, LoraConfig(target_modules=["embed_tokens"])).save_pretrained(str(tmp_path), save_embedding_layers=True)
    own = [name for name in tensors(tmp_path) if ".lora_" not in name]
    assert own
    make_policy(ModelSource(str(llava), str(tmp_path)), needs=REFERRED)
    write(tmp_path, {name: value + (name == own[0]) for name, value in tensors(tmp_path).items()})
    assert f"it holds 1 tensor that the model has no place for: {own[0]}" in complaint(llava, tmp_path)


def test_dropout_is_that_of_the_run_that_goes_on(llava: Path, adapter: Path) -> None:
    set_config(adapter, lora_dropout=0.5)
    tuner = TunerConfig(lora_dropout=0.25, freeze_vit=False, freeze_aligner=False)
    policy = make_policy(ModelSource(str(llava), str(adapter)), tuner=tuner, needs=SFT().needs)
    rates = {module.p for name, module in policy.model.named_modules() if ".lora_dropout." in name}
    assert rates == {0.25}
