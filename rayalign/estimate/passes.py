"""Which forwards and backwards an optimizer step makes of each pair, by what its algorithm needs."""

from dataclasses import dataclass

from rayalign.algorithms import Needs
from rayalign.data.companions import Companion


@dataclass(frozen=True)
class Pass:
    """One run of the language model over the rows of a micro-batch: the pairs' own, or their companion's.

    `trains`: a graph is kept and a backward follows; otherwise it is only read. `reference`: with the reference's weights.
    """

    companion: Companion | None = None
    trains: bool = False
    reference: bool = False


def passes_of(needs: Needs, *, reference_known: bool) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
    """The passes of the step's statistics, which come first, and those of the step, in order.

    Statistics of the pairs themselves find the reference's log-probs for the step, too. Where these come with the data, the
    reference is run on a companion's rows only, and only where no data hold them.
    """
    companion = needs.companion
    statistics, step = [], [Pass(trains=True)]
    if needs.statistics:  # of the companion's rows, where there is one
        statistics.append(Pass(companion))
        if needs.reference:
            statistics.append(Pass(companion, reference=True))
    if needs.reference and not (needs.statistics and companion is None):
        # Those with a companion ask the reference first.
        step.insert(1 if companion is None else 0, Pass(reference=True))
    if needs.trains_companion:
        step += [Pass(companion, reference=True)] if needs.reference else []
        step.append(Pass(companion, trains=True))
    statistics, step = (
        [item for item in items if not (reference_known and _is_in_the_data(item))] for items in (statistics, step)
    )
    return tuple(statistics), tuple(step)


def _is_in_the_data(item: Pass) -> bool:
    return item.reference and (item.companion is None or item.companion.is_stable_over_epochs)
