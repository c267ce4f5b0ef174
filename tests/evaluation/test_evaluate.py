"""What the verb evaluate refuses before it takes any resource, and which reference a model gets."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from rayalign.algorithms import Needs
from rayalign.config.command_line import parse_sections
from rayalign.config.evaluate import EvaluateConfig
from rayalign.config.inference import InferenceConfig
from rayalign.config.sections import ModelConfig
from rayalign.evaluation.contenders import contenders_of, reference_of
from rayalign.evaluation.evaluate import _read_exam, _suite_of_exam, run
from rayalign.evaluation.start import config_of
from rayalign.models.source import ModelSource
from rayalign.policy.saving import save_policy
from tests.evaluation.benchmarks.twins import put_pictures, write_lines
from tests.tiny_models import make_policy


def refusal(flags: InferenceConfig, evaluation: EvaluateConfig = EvaluateConfig()) -> str:  # noqa: B008  # frozen
    with pytest.raises(ValueError) as caught:
        run(flags, evaluation)
    return str(caught.value)


def test_there_must_be_something_to_evaluate_on(tmp_path: Path) -> None:
    assert refusal(InferenceConfig(model="m", output_dir=str(tmp_path / "out"))) == (
        "Nothing to evaluate on: pass --dataset with preference data, --benchmarks, or both."
    )


def test_a_benchmarks_files_are_read_first(tmp_path: Path) -> None:
    flags = InferenceConfig(model="m", output_dir=str(tmp_path / "out"))
    said = refusal(flags, EvaluateConfig(benchmarks=(f"amber:{tmp_path}",)))
    assert said.startswith(f"--benchmarks amber:{tmp_path}: {tmp_path}: holds no annotations.json. It needs annotations.json,")
    write_lines(tmp_path / "coco_pope_random.json", [{"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "no"}])
    said = refusal(flags, EvaluateConfig(benchmarks=(f"pope:{tmp_path}",)))
    assert said.startswith(f"--benchmarks pope:{tmp_path}: The image a.jpg is in none of {tmp_path}, {tmp_path}/val2014,")


def test_a_benchmarks_images_are_looked_for_in_its_own_folders_before_those_of_the_data_set(tmp_path: Path) -> None:
    pope, data = tmp_path / "pope", tmp_path / "data"
    pope.mkdir()
    write_lines(pope / "coco_pope_random.json", [{"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "no"}])
    put_pictures(data, "b.jpg")
    flags = InferenceConfig(model="m", output_dir=str(tmp_path / "out"), image_root=str(data))
    evaluation = EvaluateConfig(benchmarks=(f"pope:{pope}",))
    said = refusal(flags, evaluation)
    assert f"The image a.jpg is in none of {pope}, {pope}/val2014," in said
    assert f", {data}. Put the benchmark's images there" in said
    put_pictures(data, "a.jpg")
    assert suite_of(flags, evaluation) == (str(data), None)
    put_pictures(pope / "val2014", "a.jpg")
    assert suite_of(flags, evaluation) == (str(pope / "val2014"), None)


def suite_of(flags: InferenceConfig, evaluation: EvaluateConfig) -> tuple[str, str | None]:
    """The folder that a benchmark's rows read their images from, and what would be read instead."""
    config = config_of(flags)
    (word,) = evaluation.benchmarks
    suite = _suite_of_exam(_read_exam("pope", word.removeprefix("pope:"), config, evaluation), config)
    (row,) = suite.groups[0].read()
    assert isinstance(row, dict)
    return row["folder"], suite.sources.image_root


def put_mmhal(folder: Path) -> None:
    """MMHal-Bench with one question."""
    row = {"question_type": "t", "image_id": "1", "image_src": "http://host/a.jpg", "image_content": ["Cat"]}
    rows = [row | {"question": "Which?", "gt_answer": "A cat."}]
    (folder / "response_template.json").write_text(json.dumps(rows))
    (folder / "eval_gpt4.py").write_text("template = '{} {} {} {}'\n")
    put_pictures(folder / "images", "a.jpg")


def test_a_benchmark_with_a_judge_needs_one(tmp_path: Path) -> None:
    put_mmhal(tmp_path)
    said = refusal(
        InferenceConfig(model="m", output_dir=str(tmp_path / "out")), EvaluateConfig(benchmarks=(f"mmhal_bench:{tmp_path}",))
    )
    assert said == "--benchmarks mmhal_bench: its answers are rated by a judge. Pass --judge_url and --judge_model."


def test_a_second_model_and_a_reference_are_refused_by_their_own_flags(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"query": "a", "response": "b", "rejected_response": "c"}\n')
    flags = InferenceConfig(model=str(model_folder("llava")), dataset=(str(data),), output_dir=str(tmp_path / "out"))
    gone = str(tmp_path / "gone")
    assert refusal(flags, EvaluateConfig(compare=gone)) == f"--compare {gone}: there is no such folder (looked for {gone})."
    said = refusal(flags, EvaluateConfig(ref_model=gone))
    assert (
        said == f"--ref_model {gone}: there is no such folder (looked for {gone}). It names the reference; none: no reference."
    )


def test_every_reference_can_be_named_on_the_command_line() -> None:
    for words, expected in (([], "auto"), (["--ref_model", "none"], "none"), (["--ref_model", "runs/sft"], "runs/sft")):
        sections = (InferenceConfig, EvaluateConfig)
        _, evaluation = parse_sections(sections, words, prog="rayalign evaluate", description="", example="")
        assert evaluation.ref_model == expected


def test_a_run_is_compared_with_its_start_unless_another_reference_or_none_is_named(tmp_path: Path) -> None:
    source, like = ModelSource(str(tmp_path / "base"), str(tmp_path / "adapter")), ModelConfig(model=str(tmp_path / "adapter"))
    start, none, other = (reference_of(source, like, named) for named in ("auto", "none", "other"))
    assert (start and start.model, none, other and other.model) == (source.base, None, "other")


def test_a_second_model_and_a_reference_are_found_from_any_working_folder(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(model_folder("llava"))
    (tmp_path / "runs").mkdir()
    for name in ("base", "sft"):
        (tmp_path / "runs" / name).symlink_to(base)
    monkeypatch.chdir(tmp_path)
    save_policy(make_policy(Path(base)), tmp_path / "dpo")
    config = config_of(InferenceConfig(model="dpo", output_dir="out"))
    model, second = contenders_of(config, EvaluateConfig(compare="runs/sft", ref_model="runs/base"))
    assert model.reference is not None
    assert (model.reference.model, second.config.model.model) == (base, base)


def test_flags_that_nothing_would_use_are_refused(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    data, base = tmp_path / "pairs.jsonl", str(model_folder("llava"))
    data.write_text('{"query": "a", "response": "b", "rejected_response": "c"}\n')
    flags = InferenceConfig(model=base, dataset=(str(data),), output_dir=str(tmp_path / "out"))
    judged = EvaluateConfig(judge_url="http://localhost/v1", judge_model="judge")
    assert refusal(flags, judged).startswith("--judge_url: no benchmark of --benchmarks has answers that a judge rates.")
    assert refusal(flags, EvaluateConfig(max_questions=3)).startswith("--max_questions: there are no --benchmarks,")
    assert refusal(flags, EvaluateConfig(ref_model=base)) == (
        f"--ref_model {base}: is the model that is evaluated. Give another one, or none."
    )
    assert refusal(flags, EvaluateConfig(sample_kl=True)) == (
        "--sample_kl true: there is no divergence without a reference: pass --ref_model, or leave the flag out."
    )
    assert refusal(flags, EvaluateConfig(beta=0.2)) == (
        "--beta 0.2: there is no implicit reward without a reference: pass --ref_model, or leave it out."
    )
    write_lines(tmp_path / "coco_pope_random.json", [{"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "no"}])
    put_pictures(tmp_path, "a.jpg")
    flags = InferenceConfig(model=base, output_dir=str(tmp_path / "out"))
    pope = (f"pope:{tmp_path / 'coco_pope_random.json'}",)
    assert refusal(flags, EvaluateConfig(benchmarks=pope, image_checks=("shuffled",))) == (
        "--image_checks shuffled: there is no --dataset, whose pairs are scored with wrong pictures. Leave it out."
    )
    assert refusal(flags, EvaluateConfig(benchmarks=pope, ref_model="m", beta=0.2)) == (
        "--beta 0.2: is the factor of pairs' implicit rewards, and --benchmarks pope without --dataset has none. Leave it out."
    )


def test_scorers_stand_in_a_models_place(tmp_path: Path) -> None:
    data, rules = tmp_path / "pairs.jsonl", tmp_path / "rules.py"
    data.write_text('{"query": "a", "response": "b", "rejected_response": "c"}\n')
    rules.write_text("def shorter(rows):\n    return [-len(row['response']) for row in rows]\n")
    word = f"python={rules}:shorter"
    for wrong, said in (
        ({"compare": "m"}, f"--compare is of a model, and --scorer {word} stands in the place of one."),
        ({"sample_kl": True}, f"--sample_kl is of a model, and --scorer {word} stands in the place of one."),
        ({"image_checks": ("shuffled",)}, f"--image_checks is of a model, and --scorer {word} stands in the place of one."),
        ({"judge_url": "http://localhost/v1"}, f"--judge_url rates what a model writes, and --scorer {word} scores pairs."),
        ({"ref_model": "none"}, f"--ref_model none beside --scorer {word}: an implicit reward needs its reference."),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            EvaluateConfig(scorer=(word,), **wrong)
    with pytest.raises(ValueError, match=r"^--ensemble: belongs to --scorer, which is not given\."):
        EvaluateConfig(ensemble="min")
    flags = InferenceConfig(dataset=(str(data),), output_dir=str(tmp_path / "out"))
    for own, said in (
        (EvaluateConfig(scorer=(word,), ref_model="m"), f"--ref_model: no scorer of --scorer {word} uses it. Leave it out."),
        (EvaluateConfig(scorer=(word,), beta=0.2), f"--beta: no scorer of --scorer {word} uses it. Leave it out."),
        (EvaluateConfig(scorer=(word,), ensemble="min"), f"--ensemble min: --scorer {word} is the only scorer. Leave it out,"),
        (EvaluateConfig(scorer=(word,), judge_pattern="(1)"), f"--judge_pattern: no scorer of --scorer {word} uses it. Leave"),
        (EvaluateConfig(scorer=("judge=http://localhost/v1",)), "--scorer judge: pass --judge_model with the name by"),
        (EvaluateConfig(scorer=("rules",)), "--scorer rules: must be one of reward_model, implicit_reward,"),
    ):
        assert refusal(flags, own).startswith(said)
    model = InferenceConfig(model="m", dataset=(str(data),), output_dir=str(tmp_path / "out"))
    assert refusal(model, EvaluateConfig(scorer=(word,))) == f"--model: no scorer of --scorer {word} uses it. Leave it out."
    write_lines(tmp_path / "coco_pope_random.json", [{"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "no"}])
    put_pictures(tmp_path, "a.jpg")
    assert refusal(flags, EvaluateConfig(scorer=(word,), benchmarks=(f"pope:{tmp_path}",))) == (
        f"--benchmarks pope: its questions are answered by a model, and --scorer {word} scores pairs. Those of pairs are "
        "vl_rewardbench, multimodal_rewardbench, mm_rlhf_rewardbench; for the others pass --model without --scorer."
    )


def test_a_reward_model_takes_no_reference(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, data = tmp_path / "rm", tmp_path / "pairs.jsonl"
    save_policy(make_policy(model_folder("llava"), needs=Needs(head="value")), folder)
    data.write_text('{"query": "a", "response": "b", "rejected_response": "c"}\n')
    flags = InferenceConfig(model=str(folder), dataset=(str(data),), output_dir=str(tmp_path / "out"))
    for own, asked in (
        (EvaluateConfig(ref_model="sft"), "--ref_model sft"),
        (EvaluateConfig(sample_kl=True), "--sample_kl true"),
        (EvaluateConfig(beta=0.2), "--beta 0.2"),
    ):
        said = f"{asked}: {folder} is a reward model, whose scores need no reference. Leave the flag out."
        assert refusal(flags, own) == said


def test_a_reward_model_is_asked_for_no_texts(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, base = tmp_path / "rm", str(model_folder("llava"))
    save_policy(make_policy(Path(base), needs=Needs(head="value")), folder)
    put_mmhal(tmp_path)
    out = str(tmp_path / "out")
    own = {"benchmarks": (f"mmhal_bench:{tmp_path}",), "judge_url": "http://localhost/v1", "judge_model": "judge"}
    for model, more, role in ((str(folder), {}, "model"), (base, {"compare": str(folder)}, "compare")):
        assert refusal(InferenceConfig(model=model, output_dir=out), EvaluateConfig(**own, **more)) == (
            f"--benchmarks mmhal_bench: asks for texts, and --{role} {folder} is a reward model, which scores responses and "
            "writes none. Leave one of them out."
        )
