"""``python -m numba_atomflow``: the console script ``numba-atomflow``."""

from numba_atomflow.cli import main

if __name__ == "__main__":
    main()
