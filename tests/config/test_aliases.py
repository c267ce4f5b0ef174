from pathlib import Path

import pytest

from rayalign.algorithms import ALGORITHMS
from rayalign.config import command_line
from rayalign.config.aliases import ALIASES, ELSEWHERE, SAME_NAME, Alias, aliases_table
from rayalign.config.config import Config, section_types
from rayalign.config.flags import flags_of
from rayalign.config.serving import ExportConfig
from rayalign.config.translate import translate_values, translate_words

OURS = {flag.name for algorithm in ALGORITHMS.values() for section in section_types(algorithm) for flag in flags_of(section)}


def parse(*words: str) -> Config:
    return command_line.parse(ALGORITHMS, words, prog="rayalign rlhf", description="A test.")


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse(*words)
    assert stopped.value.code == 2
    return capsys.readouterr().err.removeprefix("rayalign rlhf: error: ").removesuffix("\n(--help lists every flag)\n")


def test_every_alias_is_a_name_of_one_flag_that_there_is():
    names = [alias.name for alias in ALIASES]
    elsewhere = [name for entry in ELSEWHERE for name in entry.names.split()]
    assert len(names + elsewhere) == len({*names, *elsewhere})
    assert {alias.flag for alias in ALIASES} <= OURS | {"rlhf_type"}
    assert {alias.name for alias in ALIASES if alias.name in OURS} == {
        alias.name for alias in ALIASES if alias.name == alias.flag
    }
    assert OURS.isdisjoint(elsewhere)
    assert set(SAME_NAME) <= OURS


def test_every_entry_names_its_tools_and_ends_its_sentences():
    for entry in (*ALIASES, *ELSEWHERE):
        assert entry.tools
        assert not isinstance(entry.tools, str)
    sentences = [alias.note for alias in ALIASES if alias.note] + [alias.refused for alias in ALIASES if alias.refused]
    sentences += [entry.advice for entry in ELSEWHERE] + [text for _, text in SAME_NAME.values()]
    assert all(sentence.endswith(".") for sentence in sentences)


def test_flags_that_sentences_name_are_ours():
    sentences = [alias.note + alias.refused for alias in ALIASES] + [entry.advice for entry in ELSEWHERE]
    named = {word.strip(".,:;()") for sentence in sentences for word in sentence.split() if word.startswith("--")}
    assert {word.removeprefix("--") for word in named} <= OURS | {"rlhf_type"}


SWIFT4 = "--model m --tuner_type lora --torch_dtype bfloat16 --target_modules all-linear --per_device_train_batch_size 2"
TRL = "--model_name_or_path m --use_peft --lora_r 8 --lora_target_modules all-linear --bf16 --per-device-train-batch-size=2"
FACTORY = "--stage dpo --model_name_or_path m --finetuning_type lora --lora_target all --bf16 true --pref_beta 0.1"
OWN = "--model m --sft_type lora --dtype bfloat16 --lora_target_modules ALL"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (SWIFT4, f"{OWN} --batch_size 2"),
        (TRL, f"{OWN} --batch_size 2 --lora_rank 8"),
        (FACTORY, f"{OWN} --rlhf_type dpo --beta 0.1"),
        ("--stage kto --kto_chosen_weight 2", "--rlhf_type kto --desirable_weight 2"),
        ("--lora_target q_proj,v_proj", "--lora_target_modules q_proj v_proj"),
        ("--target_modules q_proj v_proj", "--lora_target_modules q_proj v_proj"),
        ("--dtype bf16", "--dtype bfloat16"),
        ("--use_peft false --fp16", "--sft_type full --dtype float16"),
        ("--load_in_4bit true --use_bnb_nested_quant false", "--quant_bits 4 --bnb_4bit_use_double_quant false"),
        ("--load_in_4bit --double_quantization", "--quant_bits 4 --bnb_4bit_use_double_quant true"),
        ("--quantization_bit 0 --max_steps -1 --rescale_image -1", ""),
        ("--disable_gradient_checkpointing true", "--gradient_checkpointing false"),
        (
            "--cutoff_len 512 --val_size 0.1 --truncation_mode keep_start",
            "--max_length 512 --dataset_test_ratio 0.1 --truncation_strategy right",
        ),
        ("--target_modules=q_proj v_proj --custom_train_dataset_path=a b", "--lora_target_modules q_proj v_proj --dataset a b"),
        ("--disable_gradient_checkpointing True", "--gradient_checkpointing false"),
        ("--disable_gradient_checkpointing 1", "--gradient_checkpointing false"),
        ("--disable_gradient_checkpointing No", "--gradient_checkpointing true"),
        ("--bf16 True --use_peft yes --load_in_4bit 1", "--dtype bfloat16 --sft_type lora --quant_bits 4"),
        ("--fp16 on --use_peft False --load_in_4bit 0", "--dtype float16 --sft_type full"),
        ("--eval_dataset a.jsonl,b.jsonl --ray_num_workers 4", "--val_dataset a.jsonl b.jsonl --num_workers 4"),
        ("--custom_train_dataset_path a --custom_train_dataset_path b", "--dataset a b"),
    ],
)
def test_another_tools_words_are_the_same_run(theirs: str, ours: str):
    assert parse(*theirs.split()) == parse(*ours.split())


def test_a_file_may_hold_another_tools_names_and_the_command_line_wins(tmp_path: Path):
    file = tmp_path / "factory.yaml"
    file.write_text(
        "stage: dpo\nfinetuning_type: lora\nlora_target: q_proj,v_proj\nbf16: true\npref-beta: 0.2\ncutoff_len: 512\n"
        "load_in_4bit: true\nmax_steps: -1\neval_dataset: [a, b]\n"
    )
    words = "--lora_target_modules q_proj v_proj --dtype bfloat16 --beta 0.2 --max_length 512 --quant_bits 4 --val_dataset a b"
    assert parse("--config", str(file)) == parse(*words.split())
    assert parse("--config", str(file), "--beta", "0.3", "--fp16").algorithm.beta == 0.3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--lora_r 8 --lora_rank 8",
            "--lora_r and --lora_rank are one flag here, --lora_rank: give it once.",
        ),
        ("--bf16 --torch_dtype float16", "--bf16 and --torch_dtype are one flag here, --dtype: give it once."),
        ("--bf16 false", "--bf16 false: Name the type instead, such as --dtype float32."),
        ("--bf16 False", "--bf16 false: Name the type instead, such as --dtype float32."),
        ("--bf16 full", "--bf16 full: must be true or false."),
        ("--disable_gradient_checkpointing auto", "--disable_gradient_checkpointing auto: must be true or false."),
        ("--use_peft=true x", "--use_peft x: must be true or false."),
        ("--pref_beta=1 2", "Unexpected word '2': every value follows its --flag."),
        ("--pref_beta 1 --pref_beta 2", "--beta is given more than once, as 1 and as 2: give it once."),
        (
            "--pref_loss orpo",
            "--pref_loss orpo: Pass sigmoid, hinge or ipo; orpo, simpo and kto are algorithms of their own (--rlhf_type).",
        ),
        ("--stage ppo", "--stage ppo: There is no such stage here. Pass sft, rm, dpo or kto."),
        ("--stage sft --pref_beta 1", "--beta belongs to dpo, mdpo, cpo, orpo, simpo and kto, not sft."),
        ("--lora_r x", "--lora_rank x: must be a whole number."),
        ("--lora_r", "argument --lora_rank: expected one argument"),
        (
            "--deepspeed zero3",
            "--deepspeed (ms-swift 2.6, ms-swift 4.6, TRL, LLaMA-Factory) is no flag here: pass --strategy fsdp, which shards "
            "the model over the workers (--num_workers); --strategy device_map spreads it over one worker's GPUs.",
        ),
        (
            "--warmup-steps 10 --pref_ftx 1",
            "--warmup_steps (ms-swift 2.6, ms-swift 4.6, TRL, LLaMA-Factory) is no flag here: pass the fraction of the steps "
            "as --warmup_ratio.\n--pref_ftx (LLaMA-Factory) is no flag here: pass --rpo_alpha; it is a mean over tokens here, "
            "over responses there.",
        ),
    ],
)
def test_what_is_not_the_same_is_told(capsys: pytest.CaptureFixture[str], words: str, message: str):
    assert complaint(capsys, *words.split()) == message


@pytest.mark.parametrize("value", ["True", "'True'", "1", "yes", "on"])
def test_an_aliass_true_in_a_file_is_read_as_any_flags_true(tmp_path: Path, value: str):
    file = tmp_path / "a.yaml"
    file.write_text(f"disable_gradient_checkpointing: {value}\nbf16: {value}\nload_in_4bit: {value}\n")
    config = parse("--config", str(file))
    assert (config.model.gradient_checkpointing, config.model.dtype, config.tuner.quant_bits) == (False, "bfloat16", 4)


def test_two_names_of_a_flag_in_a_file_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "a.yaml"
    file.write_text("cutoff_len: 5\nmax_length: 5\n")
    message = "--cutoff_len and --max_length are one flag here, --max_length: give it once."
    assert complaint(capsys, "--config", str(file)) == message


def test_a_program_that_trains_nothing_takes_the_aliases_of_its_flags(capsys: pytest.CaptureFixture[str]):
    def export(*words: str) -> ExportConfig:
        return command_line.parse_section(ExportConfig, words, prog="rayalign export", description="", example="")

    assert export("--model-name-or-path", "m") == ExportConfig(model="m")
    with pytest.raises(SystemExit):
        export("--lora_r", "8")
    assert capsys.readouterr().err.startswith("rayalign export: error: Unknown flag --lora_rank.")


def test_a_flag_of_ours_keeps_its_name_where_another_tool_has_it_for_something_else():
    """As an algorithm of one's own may have a flag `stage`."""
    assert translate_words(["--stage", "2"], {"stage"}) == ["--stage", "2"]
    assert translate_values({"stage": 2}, {"stage"}) == {"stage": 2}
    assert translate_words(["--stage", "dpo"], ()) == ["--rlhf_type", "dpo"]


def test_values_of_an_alias_are_turned_one_by_one():
    alias = Alias("a", "b", ("TRL",), values={"all": "ALL"}, separator=",")
    assert [alias.convert(value) for value in ("all", 1, "x,y", ["all", "z"])] == ["ALL", 1, ["x", "y"], ["ALL", "z"]]
    switch = Alias("a", "b", ("TRL",), values={"true": "yes"})
    assert [switch.convert(value) for value in (True, "TRUE", 1, False, [True])] == ["yes", "yes", "yes", False, ["yes"]]


def test_the_table_has_a_line_for_every_entry():
    text = aliases_table()
    for alias in ALIASES:
        assert f"| `--{alias.name}` | {', '.join(alias.tools)} | `--{alias.flag}` |" in text
    for entry in ELSEWHERE:
        assert all(f"`--{name}`" in text for name in entry.names.split())
    lines = [line for line in text.splitlines() if line]
    assert len(lines) == len(ALIASES) + len(SAME_NAME) + len(ELSEWHERE) + 6
    assert all(line.startswith("| ") or set(line) == {"|", "-"} for line in lines)
