"""Selectors of node labels: how they are written, and that they mean what they mean to Ray."""

import pytest
from ray._private.label_utils import validate_label_selector

from rayalign.config.labels import fits_selector, in_words, parse_selector
from rayalign.config.sections import ClusterConfig

GOOD = ["zone=a", "ray.io/market-type=!spot", "ray.io/accelerator-type=in(A100,H100)", "zone=!in(a, b)", "a.b/c-d_e=F.1"]


@pytest.mark.parametrize("word", GOOD)
def test_a_selector_is_one_that_ray_takes(word: str) -> None:
    selector = parse_selector("label_selector", [word])
    assert validate_label_selector(selector) is None
    assert in_words(selector) == word.replace(" ", "")


@pytest.mark.parametrize(
    "word", ["zone", "zone=", "=a", "zone=in()", "zone=in(a", "zone=!!a", "zone=a,b", "zo ne/=a", "zone=-a"]
)
def test_another_word_is_refused_with_the_form_that_it_must_have(word: str) -> None:
    with pytest.raises(ValueError) as caught:
        ClusterConfig(label_selector=(word,))
    assert str(caught.value) == (
        f"--label_selector {word}: must be LABEL=VALUE, such as ray.io/market-type=on-demand. In place of VALUE may stand "
        "!VALUE, in(A,B) or !in(A,B), quoted for the shell."
    )
    with pytest.raises(ValueError, match=r"^--data_label_selector "):
        ClusterConfig(data_label_selector=(word,))


def test_a_label_has_one_condition() -> None:
    with pytest.raises(ValueError) as caught:
        ClusterConfig(label_selector=("zone=a", "zone=b"))
    assert str(caught.value) == (
        "--label_selector zone=b: the label zone has a condition already. Join the two, as in zone=in(A,B)."
    )


@pytest.mark.parametrize(
    ("condition", "of_a", "of_c", "without"),
    [
        ("a", True, False, False),
        ("!a", False, True, True),
        ("in(a,b)", True, False, False),
        ("!in(a,b)", False, True, True),
    ],
)
def test_a_node_fits_by_each_of_its_labels(condition: str, of_a: bool, of_c: bool, without: bool) -> None:
    selector = {"zone": condition}
    assert fits_selector({"zone": "a"}, selector) == of_a
    assert fits_selector({"zone": "c"}, selector) == of_c
    assert fits_selector({"pool": "a"}, selector) == without
    assert not fits_selector({"zone": "a"}, {**selector, "pool": "x"})
    assert fits_selector({"zone": "a"}, {})


def test_a_kind_of_gpu_needs_a_name_and_workers_with_gpus() -> None:
    assert ClusterConfig(accelerator_type="NVIDIA-GH200", gpus_per_worker=1).accelerator_type == "NVIDIA-GH200"
    with pytest.raises(ValueError) as caught:
        ClusterConfig(accelerator_type="")
    assert str(caught.value) == "--accelerator_type : must be one of Ray's names, such as L4, A100 or H100."
    with pytest.raises(ValueError) as caught:
        ClusterConfig(accelerator_type="L4", gpus_per_worker=0)
    assert str(caught.value) == (
        "--accelerator_type L4 with --gpus_per_worker 0: it says which GPUs the workers get, and they get none. Leave one of "
        "the two out."
    )
