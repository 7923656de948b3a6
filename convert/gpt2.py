"""A Hugging Face folder of GPT-2 to the body of a language model.

python -m convert.gpt2 FOLDER --out OUT [--for-dicode]
"""

import functools
import sys

from convert.parts.gpt2 import FAMILY
from convert.parts.hugging_face import main as convert_folder

main = functools.partial(convert_folder, FAMILY)

if __name__ == "__main__":
    sys.exit(main())
