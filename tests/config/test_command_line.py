import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from rayalign.algorithms import ALGORITHMS as ALL
from rayalign.algorithms import DPO, Needs
from rayalign.config import command_line
from rayalign.config.config import Config, config_from_mapping, section_types
from rayalign.config.flags import check_bounds, flag, flags_of
from rayalign.config.inference import InferenceConfig
from rayalign.config.sections import ModelConfig, OptimizerConfig
from rayalign.config.tune import TuneConfig
from rayalign.config.yaml_files import to_yaml
from rayalign.models.registry import REGISTERED_MODELS
from rayalign.sweeps.search_checks import check_search

LOSSES = (
    "sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop, "
    "sigmoid_norm, sft"
)
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Dpo:
    """DPO"""

    name: ClassVar[str] = "dpo"
    needs: ClassVar[Needs] = Needs()
    beta: float = flag(0.1, "Strength of the pull, 100% of it.", above=0)
    rpo_alpha: float = flag(1.0, "Weight.", at_least=0)

    __post_init__ = check_bounds


@dataclass(frozen=True)
class SimPo:
    """SimPO"""

    name: ClassVar[str] = "simpo"
    beta: float = flag(2.0, "Strength.", above=0)
    simpo_gamma: float = flag(1.0, "Margin.")
    cpo_alpha: float = flag(1.0, "Weight.")

    __post_init__ = check_bounds


@dataclass(frozen=True)
class Cpo:
    """CPO"""

    name: ClassVar[str] = "cpo"
    cpo_alpha: float = flag(1.0, "Weight.")


@dataclass(frozen=True)
class Sft:
    """SFT"""

    name: ClassVar[str] = "sft"


ALGORITHMS = {"sft": Sft, "dpo": Dpo, "simpo": SimPo, "cpo": Cpo}


def parse(*words: str, algorithm: str | None = None) -> Config:
    prog = f"pipelines/{algorithm or 'rlhf'}.py"
    return command_line.parse(ALGORITHMS, words, prog=prog, description="A test.", algorithm=algorithm)


def parse_real(*words: str) -> Config:
    """The same with the algorithms that there are."""
    return command_line.parse(ALL, words, prog="rlhf.py", description="A test.")


def complaint(capsys: pytest.CaptureFixture[str], *words: str, algorithm: str | None = None) -> str:
    """What a wrong command line says on stderr, without the program's name and the hint at the end."""
    with pytest.raises(SystemExit) as stopped:
        parse(*words, algorithm=algorithm)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.removeprefix(f"pipelines/{algorithm or 'rlhf'}.py: error: ").removesuffix("\n(--help lists every flag)\n")


def test_a_loss_given_as_a_method_is_told_where_it_belongs(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse_real("--rlhf_type", "ipo")
    assert "rlhf.py: error: --rlhf_type ipo: a loss of dpo. Pass --rlhf_type dpo --loss_type ipo.\n" in capsys.readouterr().err


def test_flags_are_read_with_a_space_or_an_equals_sign():
    config = parse("--beta", "0.2", "--batch_size=4", "--output_dir=a=b")
    assert (config.algorithm, config.optimizer.batch_size, config.run.output_dir) == (Dpo(beta=0.2), 4, "a=b")


def test_hyphens_are_as_good_as_underscores(tmp_path: Path):
    assert parse("--learning-rate=1e-4", "--batch-size", "2").optimizer == OptimizerConfig(learning_rate=1e-4, batch_size=2)
    (tmp_path / "a.yaml").write_text("learning-rate: 1e-4\n")
    assert parse("--config", f"{tmp_path}/a.yaml").optimizer.learning_rate == 1e-4


def test_list_flags_take_several_words_and_may_be_repeated():
    config = parse("--dataset", "a#10", "b#20", "--lora_target_modules", "q_proj", "v_proj", "--dataset", "c")
    assert config.data.dataset == ("a#10", "b#20", "c")
    assert config.tuner.lora_target_modules == ("q_proj", "v_proj")


def test_words_behind_an_equals_sign_belong_to_its_list():
    config = parse("--dataset=a.jsonl", "b.jsonl", "--columns=a=images", "b=query", "--lora_target_modules=q", "v")
    assert config.data.dataset == ("a.jsonl", "b.jsonl")
    assert config.data.columns == ("a=images", "b=query")
    assert config.tuner.lora_target_modules == ("q", "v")
    assert parse("--dataset=a=1.jsonl", "b").data.dataset == ("a=1.jsonl", "b")
    evaluation = command_line.parse_section(
        InferenceConfig, ["--model=m", "--output_dir=out", "--dataset=a", "b"], prog="", description="", example=""
    )
    assert evaluation.dataset == ("a", "b")


def test_all_files_behind_an_equals_sign_are_read(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("beta: 0.2\n")
    (tmp_path / "b.yaml").write_text("beta: 0.3\n")
    assert parse(f"--config={tmp_path}/a.yaml", f"{tmp_path}/b.yaml").algorithm.beta == 0.3


def test_booleans_are_words_and_a_bare_one_is_true():
    assert parse("--gradient_checkpointing", "false").model.gradient_checkpointing is False
    assert parse("--overwrite", "--resume=false").run.overwrite is True


def test_a_boolean_may_have_another_word_beside_true_and_false(tmp_path: Path):
    assert parse("--gradient_checkpointing", "auto").model.gradient_checkpointing == "auto"
    assert parse("--gradient_checkpointing").model.gradient_checkpointing is True
    for word, value in (("auto", "auto"), ("false", False), ("true", True)):
        (tmp_path / "a.yaml").write_text(f"gradient_checkpointing: {word}\n")
        assert parse("--config", f"{tmp_path}/a.yaml").model.gradient_checkpointing == value
    with pytest.raises(ValueError) as caught:
        ModelConfig(gradient_checkpointing="atuo")
    assert str(caught.value) == "--gradient_checkpointing atuo: must be one of true, false, auto. Did you mean auto?"


def test_the_algorithm_defaults_to_dpo_and_follows_rlhf_type():
    assert isinstance(parse().algorithm, Dpo)
    assert parse("--rlhf_type", "simpo", "--simpo_gamma", "0.5").algorithm == SimPo(simpo_gamma=0.5)
    assert isinstance(parse(algorithm="sft").algorithm, Sft)


GUIDE = (
    "--sft_type lora --dataset rlaif-v#1000 --num_train_epochs 2 --gradient_checkpointing true --batch_size 1 "
    "--learning_rate 5e-5 --warmup_ratio 0.03 --save_total_limit 2 --gradient_accumulation_steps 16 "
    "--lora_target_modules DEFAULT"
)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("--rlhf_type dpo --model_type llava1_6-mistral-7b-instruct --beta 0.1 --rpo_alpha 0.1", Dpo(beta=0.1, rpo_alpha=0.1)),
        ("--rlhf_type simpo --model_type llava1_6-mistral-7b-instruct --beta 2.0 --simpo_gamma 1.0", SimPo()),
    ],
)
def test_the_guides_commands_work_as_they_stand(own: str, expected: object):
    config = parse(*own.split(), *GUIDE.split())
    assert config.algorithm == expected
    assert config.model.model_type == "llava1_6-mistral-7b-instruct"
    assert config.global_batch_size == 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lerning_rate", "1"], "Unknown flag --lerning_rate. Did you mean --learning_rate?"),
        (["--lerning-rate=1"], "Unknown flag --lerning_rate. Did you mean --learning_rate?"),
        (["--seeed", "1"], "Unknown flag --seeed. Did you mean --seed?"),
        (["--torch_dtypee", "float32"], "Unknown flag --torch_dtypee. Did you mean --dtype?"),
        (["--max", "5"], "Unknown flag --max."),  # several begin so
        (["--beta_of_the_loss", "1"], "Unknown flag --beta_of_the_loss."),
        (["--batch", "1"], "Unknown flag --batch. Did you mean --batch_size?"),  # no abbreviations
        (["--simpo_gamma", "1"], "--simpo_gamma belongs to simpo, not dpo."),
        (["--cpo_alpha", "1"], "--cpo_alpha belongs to simpo and cpo, not dpo."),
        (["--num_samples", "2"], "--num_samples belongs to pipelines/tune.py, not pipelines/rlhf.py."),
        (["--rlhf_type", "dop"], "--rlhf_type dop: must be one of sft, dpo, simpo, cpo. Did you mean dpo?"),
        (
            ["--rlhf_type", "ppo"],  # cpo is one letter away
            "--rlhf_type ppo: an online method: the model writes responses during the run, and a reward scores them. "
            "rayalign trains on the responses of a data set and has sft, dpo, simpo, cpo.",
        ),
        (
            ["--rlhf_type", "Online-DPO"],
            "--rlhf_type Online-DPO: an online method: the model writes responses during the run, and a reward "
            "scores them. rayalign trains on the responses of a data set and has sft, dpo, simpo, cpo.",
        ),
        (
            ["--rlhf_type", "gkd"],
            "--rlhf_type gkd: a method that distils a teacher model. rayalign trains on the responses of a data set and "
            "has sft, dpo, simpo, cpo.",
        ),
        (["--batch_size", "1", "2"], "Unexpected word '2': every value follows its --flag."),
        (["--beta=0.5", "0.7"], "Unexpected word '0.7': every value follows its --flag."),
        (["--overwrite=true", "x"], "Unexpected word 'x': every value follows its --flag."),
        (["--dataset=-a", "b"], "Unexpected word 'b': every value follows its --flag."),
        (["--beta", "0.1", "--beta", "0.5"], "--beta is given more than once, as 0.1 and as 0.5: give it once."),
        (["--beta=0.1", "--beta=0.1"], "--beta is given more than once, as 0.1 and as 0.1: give it once."),
        (["--overwrite", "--overwrite=false"], "--overwrite is given more than once, as true and as false: give it once."),
        (
            ["--rlhf_type", "dpo", "--rlhf_type", "simpo"],
            "--rlhf_type is given more than once, as dpo and as simpo: give it once.",
        ),
        (["--batch_size", "x"], "--batch_size x: must be a whole number."),
        (["--beta", "-1"], "--beta -1.0: must be above 0."),
        (["--beta"], "argument --beta: expected one argument"),
    ],
)
def test_a_mistake_is_told_on_stderr_with_code_2(capsys: pytest.CaptureFixture[str], words: list[str], message: str):
    assert complaint(capsys, *words) == message


@pytest.mark.parametrize(
    ("algorithm", "words", "message"),
    [
        ("rm", ["--beta", "0.1"], "--beta belongs to dpo, mdpo, cpo, orpo, simpo and kto, not rm."),
        ("cpo", ["--simpo_gamma", "1"], "--simpo_gamma belongs to simpo, not cpo."),
        ("simpo", ["--rpo_alpha", "0.1"], "--rpo_alpha belongs to dpo, not simpo."),
        ("orpo", ["--label_smoothing", "0.1"], "--label_smoothing belongs to dpo and cpo, not orpo."),
        ("orpo", ["--cpo_alpha=1"], "--cpo_alpha belongs to cpo and simpo, not orpo."),
        ("sft", ["--loss_type", "sigmoid"], "--loss_type belongs to dpo, not sft."),
        ("kto", ["--anchor_delta", "0"], "--anchor_delta belongs to mdpo, not kto."),
        ("dpo", ["--desirable_weight", "1"], "--desirable_weight belongs to kto, not dpo."),
        ("dpo", ["--center_rewards_coefficient", "1"], "--center_rewards_coefficient belongs to rm, not dpo."),
        ("dpo", ["--loss_type", "sigmiod"], f"--loss_type sigmiod: must be one of {LOSSES}. Did you mean sigmoid?"),
        (
            "cpo",
            ["--safe_serialization", "false"],
            "--safe_serialization false: only rm has a head to write in another format, cpo has none; its weights are always "
            ".safetensors. Leave the flag out.",
        ),
    ],
)
def test_what_an_algorithm_does_not_have_is_told_by_name(
    capsys: pytest.CaptureFixture[str], algorithm: str, words: list[str], message: str
):
    with pytest.raises(SystemExit) as stopped:
        parse_real("--rlhf_type", algorithm, *words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"rlhf.py: error: {message}\n(--help lists every flag)\n"


def test_mpo_is_dpo_with_three_losses_and_their_weights():
    mpo = DPO(loss_type=("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.0), rpo_alpha=0.0)
    with_commas = "--loss_type sigmoid,bco_pair,sft --loss_weights 0.8,0.2,1 --rpo_alpha 0"
    with_spaces = "--rpo_alpha 0 --loss_weights 0.8 0.2 1 --loss_type sigmoid bco_pair sft"
    assert parse_real(*with_commas.split()).algorithm == parse_real(*with_spaces.split()).algorithm == mpo


def test_a_reward_model_may_have_its_head_written_as_bin():
    assert parse_real("--rlhf_type", "rm", "--safe_serialization", "false").run.safe_serialization is False
    assert parse_real("--rlhf_type", "cpo", "--safe_serialization", "true").run.safe_serialization is True


def test_a_pipeline_of_one_algorithm_accepts_its_own_name_only(capsys: pytest.CaptureFixture[str]):
    assert isinstance(parse("--rlhf_type", "dpo", algorithm="dpo").algorithm, Dpo)
    assert complaint(capsys, "--rlhf_type", "simpo", algorithm="dpo") == (
        "--rlhf_type simpo: pipelines/dpo.py runs dpo; use pipelines/rlhf.py or pipelines/simpo.py."
    )


def test_later_files_win_and_flags_win_over_files(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("beta: 0.2\nbatch_size: 2\nlearning_rate: 1e-5\ndataset: [x, y]\nmax_steps: null\n")
    (tmp_path / "b.yaml").write_text("batch_size: 3\nlora_rank: 4\n")
    config = parse("--config", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "--lora_rank", "2", "--dataset", "z")
    assert (config.algorithm.beta, config.optimizer.batch_size, config.tuner.lora_rank) == (0.2, 3, 2)
    assert config.optimizer.learning_rate == 1e-5  # "1e-5" is a string in YAML 1.1
    assert config.data.dataset == ("z",)
    assert parse("--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")).optimizer.batch_size == 3


def test_a_file_may_name_the_algorithm_and_a_flag_wins_over_it(tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text("rlhf_type: simpo\n")
    assert isinstance(parse("--config", str(file)).algorithm, SimPo)
    assert isinstance(parse("--config", str(file), "--rlhf_type", "sft").algorithm, Sft)


def test_words_of_a_file_are_read_as_on_the_command_line(tmp_path: Path):
    """Which YAML 1.1 takes for numbers of base 60 and 8, and for dates."""
    file = tmp_path / "a.yaml"
    file.write_text(
        "num_workers: 2:4\nprofile_steps: 10:12\nseed: 010\ndata_seed: 1_000\ndataset: [010, 2024-01-01, 1:30, 0b11]\n"
        "learning_rate: 1e-5\noutput_dir: 2024-01-01\nbeta: 1.5\nbatch_size: 4\nadam_epsilon: 1.0e-08\n"
    )
    words = "--num_workers 2:4 --profile_steps 10:12 --seed 010 --data_seed 1_000 --dataset 010 2024-01-01 1:30 0b11 "
    words += "--learning_rate 1e-5 --output_dir 2024-01-01 --beta 1.5 --batch_size 4 --adam_epsilon 1.0e-08"
    config = parse("--config", str(file))
    assert config == parse(*words.split())
    assert (config.cluster.num_workers, config.optimizer.seed, config.data.dataset[2]) == ("2:4", 10, "1:30")


def test_a_file_is_read_by_url(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("beta: 0.7\n")
    assert parse("--config", f"file://{tmp_path}/a.yaml").algorithm.beta == 0.7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bata: 1\n", "Unknown flag --bata. Did you mean --beta?"),
        ("simpo_gamma: 1\n", "--simpo_gamma belongs to simpo, not dpo."),
        ("config: b.yaml\n", "--config belongs to the command line, not in a file."),
        ("rlhf_type: [dpo]\n", "--rlhf_type ['dpo']: must be one of sft, dpo, simpo, cpo. Did you mean dpo?"),
        ("- beta\n", "--config FILE: must hold lines of `flag: value`."),
        ("beta: 1\nbeta: 2\n", "--config FILE: beta is given more than once."),
        ("batch_size: true\n", "--batch_size True: must be a whole number."),
        ("a: " + "[" * 900, "--config FILE: is nested too deep."),
        ("{a: " * 900, "--config FILE: is nested too deep."),
        ("learning_rate: 1:30\n", "--learning_rate 1:30: must be a number."),
        ("batch_size: 0x10\n", "--batch_size 0x10: must be a whole number."),
        ("beta: 1:30.5\n", "--beta 1:30.5: must be a number."),
        ("a: !!timestamp 2024-13-45\n", "--config FILE: is not YAML (month must be in 1..12)."),
        ("a: !!bool maybe\n", "--config FILE: is not YAML ('maybe')."),
        ("a: !!int ''\n", "--config FILE: is not YAML (string index out of range)."),
        ("a: !!timestamp soon\n", "--config FILE: is not YAML ('NoneType' object has no attribute 'groupdict')."),
        ("output_dir:\n  deeper: 1\n", "--output_dir {'deeper': 1}: must be text or none."),
    ],
)
def test_a_mistake_in_a_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    assert complaint(capsys, "--config", str(file)) == message.replace("FILE", str(file))


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert complaint(capsys, "--config", f"{tmp_path}/none.yaml").startswith(f"--config {tmp_path}/none.yaml: can't be read")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    assert complaint(capsys, "--config", f"{tmp_path}/bad.yaml").startswith(f"--config {tmp_path}/bad.yaml: is not YAML")


def test_the_example_of_the_help_names_a_model_that_there_is(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse_real("--help")
    words = capsys.readouterr().out.partition("example:")[2].split()
    assert words[words.index("--model_type") + 1] in REGISTERED_MODELS


@pytest.mark.parametrize("columns", [80, 100])
def test_help_shows_every_flag_by_section_and_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stopped:
        parse("--help", "--rlhf_type", "simpo")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for section in section_types(SimPo):
        for shown in flags_of(section):
            assert f"\n{shown.section}:\n" in text
            assert f"--{shown.name} " in text
    assert "--rpo_alpha" not in text
    assert "\nexample:\n  python pipelines/rlhf.py --rlhf_type dpo" in text
    assert max(map(len, text.splitlines())) <= columns


AWKWARD = {
    "dataset": ["a: b#10", "null", 'it\'s "quoted", yes', "1e-3", "ünïcode", "two\nlines", "010", "2:4", "2024-01-01", ".5"],
    "output_dir": "123",
    "learning_rate": 1.0000000000000002e-05,
    "max_steps": None,
    "lora_target_modules": [r"model\.layers\.\d+\.(q|v)_proj$"],
}


def test_yaml_of_a_config_rebuilds_it_exactly(tmp_path: Path):
    config = config_from_mapping(Dpo, AWKWARD)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert parse("--config", str(file)) == config
    assert parse("--config", str(file), algorithm="dpo") == config


def test_yaml_of_a_config_is_complete_and_explained():
    text = to_yaml(Config(SimPo()))
    assert set(yaml.safe_load(text)) == {"rlhf_type", *Config(SimPo()).to_dict()}
    lines = text.splitlines()
    for index, line in enumerate(lines):
        if not line.startswith(("#", "rlhf_type")) and line:
            assert lines[index - 1].startswith("# "), line
    assert "# Margin. (default: 1.0)\nsimpo_gamma: 1.0\n" in text


def test_print_config_shows_the_resolved_flags_and_stops(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        parse("--beta", "0.3", "--print_config")
    assert stopped.value.code == 0
    assert capsys.readouterr().out == to_yaml(Config(Dpo(beta=0.3)))


def sweep(*words: str) -> tuple[Config, TuneConfig]:
    return command_line.parse_sweep(ALGORITHMS, words, prog="pipelines/tune.py", description="A test.", check=check_search)


def test_a_sweep_takes_the_runs_flags_and_its_own(tmp_path: Path):
    config, tune = sweep("--beta", "0.2", "--search", "beta=grid:0.1,0.5", "lora_rank=choice:4,8", "--num_samples", "3")
    assert config == Config(Dpo(beta=0.2))
    assert tune == TuneConfig(search=("beta=grid:0.1,0.5", "lora_rank=choice:4,8"), num_samples=3)
    (tmp_path / "tune.yaml").write_text(to_yaml(config, tune))
    assert sweep("--config", f"{tmp_path}/tune.yaml") == (config, tune)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--search is empty"),
        (["--search", "bata=grid:1,2"], "--search bata: there is no such flag. Did you mean beta?"),
        (["--search", "simpo_gamma=grid:1,2"], "--search simpo_gamma: dpo has no such flag; simpo has."),
    ],
)
def test_a_mistake_in_a_search_is_told(capsys: pytest.CaptureFixture[str], words: list[str], message: str):
    with pytest.raises(SystemExit) as stopped:
        sweep(*words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_line_needs_neither_ray_nor_torch():
    code = "import sys, rayalign.config.command_line; sys.exit(bool({'ray', 'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
