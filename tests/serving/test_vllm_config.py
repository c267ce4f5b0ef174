"""What is written for `ray.serve.llm`, and what is refused because vLLM would do something else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayalign.config.sections import TunerConfig
from rayalign.config.serving import ServeConfig
from rayalign.models.source import ModelSource
from rayalign.policy.saving import save_policy
from rayalign.serving.vllm_config import require_for_vllm, serve_arguments, write_serve_file
from tests.tiny_models import make_policy


def adapter(folder: Path, path: Path, **tuner: Any) -> str:
    save_policy(make_policy(folder, tuner=TunerConfig(lora_target_modules=("ALL",), **tuner)), path)
    return str(path)


def test_the_file_says_what_was_asked_for(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = str(model_folder("llava"))
    config = ServeConfig(model=folder, engine="vllm", min_replicas=2, max_replicas=4, max_length=2048, max_images=3)
    write_serve_file(config, ModelSource(folder), {}, tmp_path / "serve.yaml")
    written = yaml.safe_load((tmp_path / "serve.yaml").read_text())
    assert written["http_options"] == {"host": "127.0.0.1", "port": 8000}
    (application,) = written["applications"]
    assert application["import_path"] == "ray.serve.llm:build_openai_app"
    assert application["args"]["llm_configs"] == [
        {
            "model_loading_config": {"model_id": folder, "model_source": folder},
            "engine_kwargs": {
                "max_model_len": 2048,
                "max_num_seqs": 32,
                "limit_mm_per_prompt": {"image": 3},
                "allowed_media_domains": ["none.invalid"],
                "dtype": "auto",
            },
            "deployment_config": {
                "autoscaling_config": {"min_replicas": 2, "max_replicas": 4},
                "max_ongoing_requests": 128,
            },
        }
    ]


def test_adapters_come_from_one_folder_of_an_object_store(
    model_folder: Callable[..., Path], bucket: Path, tmp_path: Path
) -> None:
    folder = model_folder("llava")
    adapter(folder, bucket / "adapters" / "dpo", lora_rank=16)
    source = ModelSource(str(folder))
    config = ServeConfig(model=str(folder), engine="vllm", adapter=("dpo=s3://bucket/adapters/dpo",))
    (llm,) = serve_arguments(config, source, {"dpo": ModelSource(str(folder), "s3://bucket/adapters/dpo")})["llm_configs"]
    assert llm["lora_config"] == {"dynamic_lora_loading_path": "s3://bucket/adapters", "max_num_adapters_per_replica": 1}
    assert {name: llm["engine_kwargs"][name] for name in ("enable_lora", "max_lora_rank", "max_loras")} == {
        "enable_lora": True,
        "max_lora_rank": 16,
        "max_loras": 1,
    }
    with pytest.raises(
        ValueError, match=r"each from the folder of its name: s3://bucket/adapters/dpo\. Put it there, or: Merge"
    ):
        serve_arguments(config, source, {"dpo": ModelSource(str(folder), str(tmp_path / "dpo"))})


@pytest.mark.parametrize(
    ("tuner", "words"),
    [
        ({"freeze_vit": False}, "it has matrices in the vision tower, and vLLM adds LoRA to language models only."),
        (
            {"freeze_vit": False, "freeze_aligner": False},
            "it has matrices in the aligner and vision tower, and vLLM adds LoRA to language models only.",
        ),
        ({"use_dora": True}, "vLLM knows no DoRA."),
    ],
)
def test_an_adapter_that_vllm_would_load_in_part_is_refused(
    model_folder: Callable[..., Path], tmp_path: Path, tuner: dict[str, Any], words: str
) -> None:
    folder = model_folder("llava")
    path = adapter(folder, tmp_path / "dpo", **tuner)
    with pytest.raises(ValueError) as caught:
        require_for_vllm(ModelSource(str(folder)), path, "--engine vllm with --adapter dpo")
    merge = "Merge it into its model (rayalign export), and take that."
    assert str(caught.value) == f"--engine vllm with --adapter dpo: {words} {merge}"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"host": "0.0.0.0"}, "--engine vllm with --host 0.0.0.0: Ray Serve's server for vLLM asks nobody for a token."),
        ({"token_file": "token"}, "--engine vllm with --token_file: Ray Serve's server for vLLM asks nobody for a token."),
        ({"allow_image_urls": True}, "--engine vllm with --allow_image_urls true: vLLM would fetch"),
        ({"max_pixels": 100}, "--engine vllm with --max_pixels: vLLM scales no images down."),
        (
            {"max_new_tokens": 16},
            "--engine vllm with --max_new_tokens 16: there a response is as long as its request asks for.",
        ),
        ({"max_image_mb": 1}, "--engine vllm with --max_image_mb 1: its server takes images of any size."),
        ({"max_body_mb": 1}, "--engine vllm with --max_body_mb 1: its server takes requests of any size."),
        ({"cpus_per_replica": 9}, "--engine vllm with --cpus_per_replica 9: Ray Serve chooses the CPUs of its replicas."),
        ({"gpus_per_replica": 0.5}, "--engine vllm with --gpus_per_replica 0.5: a replica of it has one GPU. Leave it out, or"),
    ],
)
def test_a_flag_that_vllm_would_not_follow_is_refused(
    model_folder: Callable[..., Path], flags: dict[str, Any], words: str
) -> None:
    folder = str(model_folder("llava"))
    with pytest.raises(ValueError) as caught:
        serve_arguments(ServeConfig(model=folder, engine="vllm", **flags), ModelSource(folder), {})
    assert str(caught.value).startswith(words)
