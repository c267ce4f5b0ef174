"""What a run of any training algorithm will need: memory, GPUs, hours and cost, before it is started."""

from rayalign.main import pipeline

if __name__ == "__main__":
    pipeline(__file__)
