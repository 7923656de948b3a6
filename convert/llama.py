"""A Hugging Face folder of Llama to the body of a language model.

python -m convert.llama FOLDER --out OUT [--for-dicode]
"""

import functools
import sys

from convert.parts.hugging_face import main as convert_folder
from convert.parts.llama import FAMILY

main = functools.partial(convert_folder, FAMILY)

if __name__ == "__main__":
    sys.exit(main())
