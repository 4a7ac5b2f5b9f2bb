# SPDX-License-Identifier: Apache-2.0
"""``python -m rasteret_dask`` is the command ``rasteret-dask``, also where that is not on the PATH."""

import sys

from rasteret_dask.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
