import base64
import dataclasses
import hashlib
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from typing import Any

import pytest
from PIL import Image

from rayalign.report.conversations import Answers, Conversation, thumbnail
from rayalign.report.page import Times, render_report
from rayalign.report.pairs import ScoredPair, correlation, extremes

HOSTILE = "</title></style><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


def image_bytes(*, size: tuple[int, int] = (640, 480), mode: str = "RGB", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


def pair(number: int, **changes: Any) -> ScoredPair:
    made = ScoredPair(
        id=f"pair-{number}",
        reward_chosen=number / 10,
        reward_rejected=0.25,
        tokens_chosen=10 + number,
        tokens_rejected=12,
    )
    return dataclasses.replace(made, **changes)


def conversation(pair_id: str = "pair-0", **changes: Any) -> Conversation:
    number = pair_id.rpartition("-")[2]
    made = Conversation(
        turns=(("user", f"question {number}"),), chosen=f"good answer {number}", rejected=f"poor answer {number}"
    )
    return dataclasses.replace(made, **changes)


METRICS = [
    {"step": 0, "eval_loss": 0.6931, "eval_rewards/accuracies": 0.5, "eval_rewards/margins": 0.0},
    {"step": 5, "loss": 0.61, "rewards/chosen": 0.1, "rewards/rejected": -0.1, "grad_norm": 2.5, "learning_rate": 5e-5},
    {"step": 10, "loss": 0.52, "rewards/chosen": 0.2, "rewards/rejected": -0.3, "grad_norm": 2.0, "learning_rate": 4e-5},
    {
        "step": 10,
        "eval_loss": 0.5432,
        "eval_rewards/accuracies": 0.8125,
        "eval_rewards/margins": 1.357,
        "pairs_per_second": 3.21,
    },
]


def render(**changes: Any) -> str:
    values: dict[str, Any] = {
        "title": "my run",
        "config": {"model": "some/model", "dataset": ["rlaif-v#1000"], "beta": 0.1},
        "summary": {"algorithm": "dpo", "versions": {"torch": "2.7.1"}},
        "metrics": METRICS,
        "dropped": {"image cannot be decoded": 3},
        "pairs": [pair(k) for k in range(40)],
        "answers": Answers(),
        "times": Times(4325.0, {"training": 4000.0, "other": 325.0}),
        "num_steps": 10,
        **changes,
    }
    conversations = {made.id: conversation(made.id) for made in values["pairs"]}
    return render_report(**{"conversations": conversations, **values})


class Page(HTMLParser):
    """Tags with their attributes, and the text, of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != [("style", {})]:
            self.text += data


def test_the_page_shows_the_values_given() -> None:
    page = Page(render())
    for words in (
        "my run",
        "dpo",
        "some/model",
        "rlaif-v#1000",
        "Wall time1 h 12 minof the whole command",
        "Accuracy of the implicit reward0.5 → 0.812540 held-out pairs, start → 10",
        "Margin0 → 1.357",
        "Loss0.6931 → 0.5432",
        "3.21",
    ):
        assert words in page.text
    assert "image cannot be decoded3total3" in page.text
    assert "versions.torch2.7.1" in page.text


@pytest.mark.parametrize(
    "part", ["title", "config", "summary", "dropped", "pairs", "score_name", "conversations", "answers", "times"]
)
def test_hostile_text_stays_text(part: str) -> None:
    hostile_pairs = [pair(k, id=f"{HOSTILE}{k}") for k in range(3)]
    hostile = Conversation(turns=((HOSTILE, HOSTILE), ("user", f"<image>{HOSTILE}")), chosen=HOSTILE, rejected=HOSTILE)
    values: dict[str, Any] = {
        "title": HOSTILE,
        "config": {HOSTILE: HOSTILE, "model": HOSTILE, "dataset": [HOSTILE], "nested": {HOSTILE: [HOSTILE]}},
        "summary": {"algorithm": HOSTILE, HOSTILE: HOSTILE},
        "dropped": {HOSTILE: 1},
        "pairs": hostile_pairs,
        "score_name": HOSTILE,
        "conversations": {f"pair-{k}": hostile for k in range(40)},
        "answers": Answers({"pair-1": HOSTILE}, {"pair-1": HOSTILE}, failed=HOSTILE),
        "times": Times(1.0, {HOSTILE: 1.0}),
    }
    harmless = {name for name, _ in Page(render()).tags}
    page = Page(render(**{part: values[part]}))
    assert HOSTILE in page.text
    assert {name for name, _ in page.tags} <= harmless
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    shown = {"pair-1": conversation(images=(image_bytes(),)), "pair-2": conversation()}
    page = Page(render(pairs=[pair(1), pair(2)], conversations=shown))
    assert not {"script", "link", "iframe", "object", "base"} & {name for name, _ in page.tags}
    links = [
        value or "" for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href", "srcset")
    ]
    assert links
    assert all(link.startswith("data:image/jpeg;base64,") for link in links)


def test_the_content_security_policy_allows_the_style_sheet_and_no_script() -> None:
    page = render()
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    policy = next(attributes["content"] for _, attributes in Page(page).tags if "http-equiv" in attributes)
    assert style is not None
    style_hash = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{style_hash}'; img-src data:; base-uri 'none'; form-action 'none'"
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert " style=" not in page


def test_every_figure_is_well_formed() -> None:
    figures = re.findall(r"<figure.*?</figure>", render(), re.DOTALL)
    titles = [ElementTree.fromstring(figure).findtext("figcaption/b") for figure in figures]
    assert titles == [
        "Loss",
        "Accuracy of the implicit reward",
        "Margin",
        "Rewards",
        "Gradient norm",
        "Learning rate",
        "Pairs per second",
        "Distribution of reward",
        "Distribution of margins",
        "Margin against length",
    ]


def test_histograms_count_every_pair_once() -> None:
    page = render(pairs=[pair(k) for k in range(137)])
    for side in ("chosen", "rejected", "margin"):
        counts = re.findall(rf"<title>[-\d.]+ to [^<]*\n{side}: (\d+)", page)
        assert sum(int(count) for count in counts) == 137


def test_the_correlation_of_a_known_case() -> None:
    # deviations x: -1.5 -0.5 0.5 1.5, y: -1.5 0.5 -0.5 1.5; 4.0 / sqrt(5.0 * 5.0)
    assert correlation([(1, 1), (2, 3), (3, 2), (4, 4)]) == pytest.approx(0.8, abs=1e-12)  # rounding of a float64
    assert correlation([(1, 1), (2, 3), (3, 2), (4, 4), (5, math.nan)]) == pytest.approx(0.8, abs=1e-12)


@pytest.mark.parametrize("points", [[], [(1.0, 1.0)], [(1.0, 1.0), (1.0, 2.0)], [(1.0, 2.0), (2.0, 2.0)]])
def test_there_is_no_correlation_where_nothing_varies(points: list[tuple[float, float]]) -> None:
    assert math.isnan(correlation(points))


def test_the_length_table_tells_accuracy_by_which_response_is_longer() -> None:
    pairs = [
        pair(1, reward_chosen=1, reward_rejected=0, tokens_chosen=9, tokens_rejected=3),  # longer, right
        pair(2, reward_chosen=0, reward_rejected=1, tokens_chosen=8, tokens_rejected=3),  # longer, wrong
        pair(3, reward_chosen=3, reward_rejected=0, tokens_chosen=2, tokens_rejected=3),  # shorter, right
        pair(4, reward_chosen=1, reward_rejected=1, tokens_chosen=3, tokens_rejected=3),  # equal, tie
    ]
    text = Page(render(pairs=pairs)).text
    assert "chosen is longer20.50chosen is shorter113chosen is equally long10.50" in text
    assert "the longer response would have an accuracy of 0.625; the scores have 0.625." in text


def test_worst_and_best_pairs_are_eight_each_and_never_the_same() -> None:
    worst, best = extremes([pair(k) for k in range(40)])
    assert [p.id for p in worst] == [f"pair-{k}" for k in range(8)]
    assert [p.id for p in best] == [f"pair-{k}" for k in range(39, 31, -1)]
    worst, best = extremes([pair(k) for k in range(5)])
    assert [p.id for p in worst] == ["pair-0", "pair-1"]
    assert [p.id for p in best] == ["pair-4", "pair-3", "pair-2"]


def test_pairs_without_a_finite_margin_are_neither_worst_nor_best() -> None:
    pairs = [pair(1), pair(2, reward_chosen=math.nan), pair(3, reward_rejected=math.inf)]
    assert extremes(pairs) == ([], [pair(1)])
    assert "1 not finite" in render(pairs=pairs)


def test_a_pair_is_shown_with_all_it_holds() -> None:
    shown = conversation("pair-7", images=(image_bytes(), b"not an image"))
    page = Page(render(pairs=[pair(7, reward_chosen=1.5, reward_rejected=-0.75)], conversations={"pair-7": shown}))
    for words in (
        "margin +2.25",
        "pair-7",
        "question 7",
        "chosen · reward 1.5 · 17 tokens",
        "rejected · reward -0.75 · 12 tokens",
    ):
        assert words in page.text
    assert "picture 2 of 2 cannot be read" in page.text
    assert [attributes["alt"] for name, attributes in page.tags if name == "img"] == ["picture 1 of 2"]


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "JPEG"), ("L", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("RGBA", "WEBP"), ("CMYK", "JPEG")]
)
def test_images_become_small_jpegs(mode: str, kind: str) -> None:
    source = thumbnail(image_bytes(size=(1200, 300), mode=mode, kind=kind))
    assert source is not None
    with Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,")))) as small:
        assert (small.format, small.mode, small.size) == ("JPEG", "RGB", (256, 64))


@pytest.mark.parametrize("content", [b"", b"<svg onload='alert(1)'/>", image_bytes()[:60]])
def test_what_is_no_image_has_no_thumbnail(content: bytes) -> None:
    assert thumbnail(content) is None


def test_long_texts_are_cut_and_say_so() -> None:
    page = Page(render(pairs=[pair(1)], conversations={"pair-1": conversation(turns=(("user", "x" * 7000),))}))
    assert "… and 2,000 more characters" in page.text


def test_a_run_of_ten_thousand_steps_makes_a_small_page() -> None:
    long = [{"step": step, "loss": math.sin(step), "grad_norm": 1.0 + step % 7} for step in range(10_000)]
    page = render(metrics=long)
    assert len(re.findall(r'class="strip"', page)) < 1200
    assert len(page) < 400_000


def test_metrics_that_are_not_finite_are_tolerated_and_reported() -> None:
    page = Page(render(metrics=[{"step": 1, "loss": math.nan, "grad_norm": math.inf}, {"step": 2, "loss": math.nan}]))
    assert "This run needs a look" in page.text
    assert "Not finite (NaN or infinite): loss, at 2 of 2 logged steps, first at step 1." in page.text


def test_a_run_without_rejected_responses_shows_what_it_has() -> None:
    records = [pair(k, reward_chosen=-1 - k / 10, reward_rejected=math.nan, tokens_rejected=0) for k in range(30)]
    metrics = [{"step": 5, "loss": 1.5, "logps/chosen": -80.0}, {"step": 10, "loss": 1.25, "eval_loss": 1.375}]
    page = render(pairs=records, metrics=metrics, score_name="log-prob per token")
    text = Page(page).text
    for words in ("1.375", "Distribution of log-prob per token", "Lowest log-prob per token", "Highest log-prob per token"):
        assert words in text
    assert "chosen · log-prob per token -3.9 · 39 tokens" in text
    for words in ("nan", "Length bias", "Margin of", "rejected ·", "Accuracy of", "Lowest scores"):
        assert words not in text
    for words in ("Held-out records30", "Worst and best records", "By the log-prob per token of the response."):
        assert words in text


def good(number: int, reward: float, **changes: Any) -> ScoredPair:
    return pair(number, reward_chosen=reward, reward_rejected=math.nan, tokens_rejected=0, **changes)


def bad(number: int, reward: float, **changes: Any) -> ScoredPair:
    return pair(number, reward_rejected=reward, reward_chosen=math.nan, tokens_chosen=0, **changes)


def histogram_of(page: str, title: str) -> str:
    """The legend of a figure and the numbers that it shows on hover, as text; empty where there is no such figure."""
    figures = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    return next((Page(figure).text for figure in figures if f"<b>{title}</b>" in figure), "")


def test_a_pair_counts_by_its_margin_a_good_response_by_its_reward_and_a_bad_one_by_minus_its_reward() -> None:
    records = [
        pair(1, reward_chosen=2.0, reward_rejected=0.5),  # 1.5
        good(2, 3.0),
        good(3, -2.0),
        bad(4, 1.0),  # -1
        bad(5, -2.5),  # 2.5
        good(6, math.nan),
        bad(7, math.inf),
    ]
    worst, best = extremes(records)
    assert [(p.id, p.score) for p in worst] == [("pair-3", -2.0), ("pair-4", -1.0)]
    assert [(p.id, p.score) for p in best] == [("pair-2", 3.0), ("pair-5", 2.5), ("pair-1", 1.5)]


def test_a_single_response_is_shown_without_the_side_that_it_does_not_have() -> None:
    text = Page(render(pairs=[good(1, 3.0), bad(2, 1.0), pair(3, reward_chosen=2.0)])).text
    for words in ("chosen · reward 3 · 11 tokensgood answer 1", "rejected · reward 1 · 12 tokenspoor answer 2"):
        assert words in text
    assert text.count("chosen · reward") == text.count("rejected · reward") == 2
    assert text.count("margin +1.75") == 1
    assert "nan" not in text
    assert "0 tokens" not in text
    for words in ("Lowest scores", "Highest scores", "Worst and best records", "Held-out records3"):
        assert words in text
    assert (
        "Margin is the reward of the chosen response less that of the rejected one. The score of a pair is its margin, that of "
        "a single good response its reward, that of a single bad one its reward times -1."
    ) in text


def test_histograms_hold_the_sides_that_there_are_and_miss_none() -> None:
    page = render(pairs=[good(1, 3.0), good(2, 1.0), bad(3, 1.0), pair(4, reward_chosen=2.0, reward_rejected=0.5)])
    scores = histogram_of(page, "Distribution of reward")
    assert "chosen, mean 2" in scores
    assert "rejected, mean 0.75" in scores
    assert "margin, mean 1.5" in histogram_of(page, "Distribution of margins")
    assert "not finite" not in page


@pytest.mark.parametrize(("response", "side", "other"), [(good, "chosen", "rejected"), (bad, "rejected", "chosen")])
def test_single_responses_of_one_kind_have_a_histogram_of_their_side_alone(response: Any, side: str, other: str) -> None:
    page = render(pairs=[response(k, k / 10) for k in range(30)])
    scores = histogram_of(page, "Distribution of reward")
    assert f"{side}, mean 1.45" in scores
    assert other not in scores
    assert histogram_of(page, "Distribution of margins") == ""
    text = Page(page).text
    assert "After the last evaluation, 30 records." in text
    assert "Length bias" not in text
    assert f"{other} ·" not in text


def test_length_is_judged_by_pairs_alone() -> None:
    singles = [good(1, 3.0), bad(2, 4.0)]
    pairs = [pair(k, reward_chosen=1, reward_rejected=0) for k in (3, 4)]
    text = Page(render(pairs=[*singles, *pairs])).text
    assert "chosen is longer211" in text
    assert "chosen is shorter" not in text
    assert "chosen is equally long" not in text


def test_healthy_single_responses_give_no_warning() -> None:
    records = [good(k, 1.0 + k, tokens_chosen=10 + k) for k in range(15)] + [bad(k, -1.0 - k) for k in range(15, 30)]
    metrics = [
        {"step": 5, "loss": 0.5, "eval_loss": 0.5, "eval_logps/chosen": -80.0, "eval_rewards/chosen": 0.0, "grad_norm": 1.0},
        {"step": 10, "loss": 0.3, "eval_loss": 0.3, "eval_logps/chosen": -95.0, "eval_rewards/chosen": 0.9, "kl": 0.125},
    ]
    text = Page(render(pairs=records, metrics=metrics)).text
    assert "✓ No warning signs in the metrics." in text
    assert "KL estimate" in text


def test_a_reward_models_page_has_rewards_and_no_log_probs() -> None:
    page = render(summary={"algorithm": "rm"}, pairs=[pair(k, tokens_chosen=10 + k % 2) for k in range(40)])
    assert "Log-probs of the responses" not in page
    assert histogram_of(page, "Distribution of reward")
    assert "✓ No warning signs in the metrics." in page


def test_without_held_out_records_or_with_few_the_page_says_what_cannot_be_told() -> None:
    training = [{"step": 5, "loss": 0.6}, {"step": 10, "loss": 0.5}]
    text = Page(render(pairs=[], metrics=training)).text
    assert "No warning signs in the metrics. No held-out record was evaluated" in text
    assert "✓" not in text
    text = Page(render(pairs=[pair(k) for k in range(6)], metrics=training)).text
    assert "Held-out pairs: only 6, of which an accuracy is known to ± 0.41 at best." in text
    assert "✓" not in text
    text = Page(render(pairs=[], metrics=[{"step": 5, "loss": math.nan}])).text
    assert "This run needs a look" in text
    assert "No held-out record was evaluated" in text


def test_a_page_on_the_best_model_describes_it_and_not_the_weights_that_were_left() -> None:
    figures = {0: (0.5, 0.7, 1.0), 50: (0.9, 0.5, 1.0), 100: (0.55, 0.9, 4.0)}
    metrics = [
        {"step": step, "eval_rewards/accuracies": accuracy, "eval_loss": loss, "eval_nll_loss": nll}
        for step, (accuracy, loss, nll) in figures.items()
    ]
    pairs = [pair(k, reward_chosen=1.0 if k % 10 else -1.0, tokens_chosen=10 + k % 3) for k in range(100)]
    stopped = "stopped at step 100: nothing better in 3 evaluations than eval_loss 0.5 at step 50"
    best = {"algorithm": "dpo", "steps": 100, "model_step": 50, "stopped_early": stopped}
    text = Page(render(metrics=metrics, pairs=pairs, summary=best, num_steps=100)).text
    assert "Accuracy of the implicit reward0.5 → 0.9100 held-out pairs, start → 50" in text
    assert "✓ No warning signs" in text
    assert (
        "Stopped at step 100: nothing better in 3 evaluations than eval_loss 0.5 at step 50. The model is that of step 50, the "
        "best one; tiles and warnings are of it."
    ) in text
    text = Page(render(metrics=metrics, pairs=pairs, summary={**best, "model_step": 100}, num_steps=100)).text
    assert "0.5 → 0.55100 held-out pairs, start → 100" in text
    assert "Held-out loss was lowest at step 50" in text
    assert "The model is that of step" not in text


def test_what_mdpo_makes_of_damaged_images_is_drawn() -> None:
    line = {"step": 5, "loss": 1.5, "conditional/accuracies": 0.75, "conditional/margins": 0.0625}
    page = render(metrics=[line, {**line, "step": 6}])
    assert "training: 0.75" in histogram_of(page, "Accuracy of true against damaged images")
    assert "training: 0.0625" in histogram_of(page, "Margin of true over damaged images")


def test_a_run_that_has_only_begun_says_so() -> None:
    text = Page(render(summary={}, metrics=[], dropped={}, pairs=[])).text
    assert (
        "Not finished, step 0 of 10. This page is written anew at every evaluation; load it again to see a newer one." in text
    )
    assert "No metrics have been logged yet." in text
    assert "No record was dropped." in text


def test_the_page_can_be_written_whatever_the_text_holds() -> None:
    odd = {"pair-1": conversation(turns=(("user", "odd \ud800 \x00"),))}
    assert "odd \ud800".encode("utf-8", "replace") in render(pairs=[pair(1)], conversations=odd).encode()


def test_the_page_says_where_the_time_went_and_of_how_many_starts() -> None:
    times = Times(4325.0, {"ray_start": 0.0, "training": 4000.0, "other": 325.0})
    text = Page(render(times=times)).text
    assert (
        "Where the time wentOf the whole command, from its start.training1 h 6 minstarting workers, and the rest5 min 25 s"
        in text
    )
    text = Page(render(times=dataclasses.replace(times, starts=3))).text
    assert (
        "Added up over 3 starts of the command; of a start that was cut short, what came after its last evaluation isn’t"
        in text
    )
    assert "Where the time went" not in render(times=Times())


def test_a_value_with_a_standard_error_is_shown_with_it() -> None:
    line = {"step": 10, "eval_image_reliance": 0.25, "eval_image_reliance/stderr": 0.04567, "eval_image_reliance/pairs": 80}
    assert "Picture reliance0.25± 0.046 standard error, step 10" in Page(render(metrics=[*METRICS, line])).text
