"""Which programs are compiled; `_cache_size` of a function falls as others fill JAX's cache."""

import contextlib

from jax import monitoring

EVENT = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations(name):
    """A list that gets an entry for each program of the function of that name."""
    log = []

    def note(event, _, fun_name="", **more):
        if event == EVENT and fun_name == f"jit({name})":
            log.append(fun_name)

    monitoring.register_event_duration_secs_listener(note)
    try:
        yield log
    finally:
        monitoring.unregister_event_duration_listener(note)
