"""`python -m psilora.doctor`."""

import sys

from psilora.doctor.command import main

if __name__ == "__main__":
    sys.exit(main())
