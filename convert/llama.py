"""A Hugging Face folder of Llama to the body of a language model.

python -m convert.llama FOLDER --out OUT [--for-dicode]
"""

import functools
import sys

from convert.parts import hugging_face, llama

main = functools.partial(hugging_face.main, llama.FAMILY)

if __name__ == "__main__":
    sys.exit(main())
