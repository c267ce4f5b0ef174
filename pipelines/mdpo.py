"""mDPO: preference optimisation that can't be learnt from the text alone."""

from rayalign.main import pipeline

if __name__ == "__main__":
    pipeline(__file__)
