"""`python -m ngc_jax.models.families [errors.json [encoder_errors.json]]` prints the tables of architectures."""

import json
import sys
from pathlib import Path

from ngc_jax.models.families.encoders import encoder_table
from ngc_jax.models.families.table import support_table

if __name__ == "__main__":
    errors = [json.loads(Path(file).read_text()) for file in sys.argv[1:]] + [None] * 2
    print(support_table(errors[0]), encoder_table(errors[1]), sep="\n\n")
