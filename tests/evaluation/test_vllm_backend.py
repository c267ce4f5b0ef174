"""What vLLM is asked for by `generate --backend vllm`, of a stand-in that has its names: vLLM itself needs a GPU."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rayalign.algorithms import SFT
from rayalign.config.config import Config
from rayalign.config.sections import ClusterConfig, DataConfig, ModelConfig, TunerConfig
from rayalign.data.rows import Sources
from rayalign.evaluation.vllm_backend import make_vllm_work
from rayalign.policy.generation import Sampling
from rayalign.policy.saving import save_policy
from tests.tiny_models import make_policy, noise_image

SAMPLING = Sampling(n=2, temperature=0.8, top_p=0.9, max_new_tokens=7, seed=3)


class Engine:
    """Answers each request with as many responses as it asks for: the prompt's first token, then the end token."""

    made: "list[Engine]" = []  # noqa: RUF012  # of the test

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.asked: list[tuple[dict[str, Any], Any, Any]] = []
        Engine.made.append(self)

    def generate(self, requests: Sequence[Any], params: Sequence[Any], *, lora_request: Any, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        self.asked += [(request, own, lora_request) for request, own in zip(requests, params, strict=True)]

        def response(request: dict[str, Any], own: Any) -> Any:
            ids = [request["prompt_token_ids"][0], own.stop_token_ids[0]]
            return SimpleNamespace(token_ids=ids, finish_reason="stop")

        return [
            SimpleNamespace(outputs=[response(request, own) for _ in range(own.n)])
            for request, own in zip(requests, params, strict=True)
        ]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    vllm: Any = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = Engine, lambda **values: SimpleNamespace(**values)
    lora, request = ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    request.LoRARequest = lambda *values: values  # type: ignore[attr-defined]  # a stand-in
    for module in (vllm, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Engine, "made", [])
    return Engine.made


def config_of(model: Path) -> Config:
    return Config(SFT(), DataConfig(max_length=512), ModelConfig(model=str(model)), cluster=ClusterConfig(gpus_per_worker=1.0))


def row(number: int, folder: Path, **more: Any) -> dict[str, Any]:
    return {"id": f"p{number}", "position": number, "folder": str(folder), "row": {"query": "Which is it?", **more}}


def saved(base: Path, folder: Path, **tuner: Any) -> Path:
    save_policy(make_policy(base, tuner=TunerConfig(lora_rank=4, **tuner)), folder)
    return folder


def test_vllm_gets_our_prompts_the_adapter_and_seeds_of_the_prompts_own(
    model_folder: Callable[..., Path], tmp_path: Path, engines: list[Engine]
) -> None:
    adapter = saved(model_folder("llava"), tmp_path / "adapter")
    (tmp_path / "a.png").write_bytes(noise_image(40, 30))
    work = make_vllm_work(config_of(adapter), Sources((), None, False), SAMPLING)
    rows = [row(0, tmp_path), row(1, tmp_path, images=["a.png"]), row(2, tmp_path, images=["gone.png"])]
    first, second, third = work(rows)
    assert [line["num_tokens"] for line in [*first, *second]] == [1] * 4  # type: ignore[union-attr]  # no errors
    assert {line["is_ended"] for line in [*first, *second]} == {True}  # type: ignore[union-attr]
    assert getattr(third, "reason", None) == "image missing"
    (engine,) = engines
    wanted = {"model": str(model_folder("llava")), "max_model_len": 512, "enable_lora": True, "max_lora_rank": 8}
    assert {name: engine.options[name] for name in wanted} == wanted
    (plain, params, lora), (pictured, others, _) = engine.asked
    assert "multi_modal_data" not in plain
    assert len(pictured["multi_modal_data"]["image"]) == 1
    assert (params.n, params.temperature, params.top_p, params.max_tokens) == (2, 0.8, 0.9, 7)
    assert params.seed != others.seed
    assert lora[-1] == str(adapter)


@pytest.mark.parametrize(
    ("tuner", "words"),
    [
        ({"use_dora": True}, "vLLM knows no DoRA."),
        ({"lora_target_modules": ("ALL",), "freeze_vit": False}, "it has matrices in the vision tower, and vLLM adds LoRA to"),
    ],
)
def test_an_adapter_that_vllm_would_load_in_part_is_refused(
    model_folder: Callable[..., Path], tmp_path: Path, engines: list[Engine], tuner: dict[str, Any], words: str
) -> None:
    adapter = saved(model_folder("llava"), tmp_path / "adapter", **tuner)
    with pytest.raises(ValueError, match=f"^--backend vllm with the adapter {adapter}: {words}"):
        make_vllm_work(config_of(adapter), Sources((), None, False), SAMPLING)
    assert engines == []


def test_without_vllm_or_a_gpu_the_flag_is_refused(model_folder: Callable[..., Path], engines: list[Engine]) -> None:
    on_cpus = Config(SFT(), model=ModelConfig(model=str(model_folder("llava"))), cluster=ClusterConfig(gpus_per_worker=0.0))
    with pytest.raises(ValueError, match=r"^--backend vllm: the workers have no GPU\."):
        make_vllm_work(on_cpus, Sources((), None, False), SAMPLING)
