"""GPT-2 of Hugging Face, a folder or a name on the Hub, to the body of a language model.

python -m convert gpt2 SOURCE --out OUT [--for-dicode]
"""

import functools
import sys

from convert.parts import gpt2, hugging_face

main = functools.partial(hugging_face.main, gpt2.FAMILY)

if __name__ == "__main__":
    sys.exit(main())
