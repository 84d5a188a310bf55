"""A folder for ``sys.path``: the names of other projects, standing for the modules of wsis.

:func:`wsis.compat.install` puts it there. A module found through a path, and not only an entry of
``sys.modules``, is also found by worker processes that start anew (joblib's, or multiprocessing's
``spawn``): they get their parent's path, but not its modules.
"""
