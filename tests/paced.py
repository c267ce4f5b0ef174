"""An elastic run that takes its time on a fast machine, too, and looks for room sooner than a user's does."""

PROGRAM = """
import sys
from rayalign.training import driver
driver.RESIZE_SECONDS = 2.0  # a user's nodes come more slowly
from rayalign.main import main
sys.exit(main())
"""

PACED_DPO = """
import time
from dataclasses import dataclass
from typing import ClassVar

from rayalign.algorithms import DPO


@dataclass(frozen=True)
class Paced(DPO):
    '''DPO that is slow on a fast machine, too'''

    name: ClassVar[str] = "paced"

    def loss(self, *arguments, **named):
        time.sleep(0.2)
        return super().loss(*arguments, **named)


ALGORITHMS = (Paced,)
"""
