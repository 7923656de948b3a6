"""Llama of Hugging Face, a folder or a name on the Hub, to the body of a language model.

python -m convert llama SOURCE --out OUT [--for-dicode]
"""

import functools
import sys

from convert.parts import hugging_face, llama

main = functools.partial(hugging_face.main, llama.FAMILY)

if __name__ == "__main__":
    sys.exit(main())
