"""`python -m ngc_jax.models.families [errors.json]` prints the table of supported architectures in Markdown."""

import json
import sys
from pathlib import Path

from ngc_jax.models.families.table import support_table

if __name__ == "__main__":
    print(support_table(json.loads(Path(sys.argv[1]).read_text()) if len(sys.argv) > 1 else None))
