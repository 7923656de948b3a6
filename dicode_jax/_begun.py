"""When the package began to be imported, which its first line does."""

import time

STARTED = time.time()
