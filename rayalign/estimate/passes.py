"""Which forwards and backwards an optimizer step makes of each pair, by what its algorithm needs."""

from dataclasses import dataclass

from rayalign.algorithms import Needs
from rayalign.data.batch import CompanionKind


@dataclass(frozen=True)
class Pass:
    """One run of the language model over the rows of a micro-batch: the pairs' own (`rows` none) or their companions'.

    `trains`: a graph is kept and a backward follows; otherwise it is only read. `reference`: with the reference's weights.
    """

    rows: CompanionKind = "none"
    trains: bool = False
    reference: bool = False


def passes_of(needs: Needs, *, reference_known: bool) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
    """The passes of the step's statistics, which come first, and those of the step, in order.

    Statistics of the pairs themselves find the reference's log-probs for the step, too. Where these come with the data, the
    reference is run on mismatched rows only, which no data hold.
    """
    first_pass: CompanionKind = "mismatched" if needs.companion == "mismatched" else "none"
    statistics, step = [], [Pass(trains=True)]
    if needs.statistics:
        statistics.append(Pass(first_pass))
        if needs.reference:
            statistics.append(Pass(first_pass, reference=True))
    if needs.reference and not (needs.statistics and first_pass == "none"):
        # Those with a companion ask the reference first.
        step.insert(1 if needs.companion == "none" else 0, Pass(reference=True))
    if needs.companion == "damaged":
        step += [Pass("damaged", reference=True)] if needs.reference else []
        step.append(Pass("damaged", trains=True))
    statistics, step = (
        [item for item in items if not (reference_known and _is_in_the_data(item))] for items in (statistics, step)
    )
    return tuple(statistics), tuple(step)


def _is_in_the_data(item: Pass) -> bool:
    return item.reference and item.rows != "mismatched"
