"""Any training algorithm by name: `--rlhf_type dpo` and so on."""

from rayalign.main import pipeline

if __name__ == "__main__":
    pipeline(__file__)
