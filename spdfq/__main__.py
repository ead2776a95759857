"""``python -m spdfq``, which is also what torchrun starts."""

from spdfq_cli.main import main

if __name__ == "__main__":
    main(prog_name="spdfq")
