"""`python -m openblip2`, which launchers of many processes start: `torchrun -m openblip2 train ...`."""

from openblip2.cli import main

if __name__ == "__main__":
    main()
