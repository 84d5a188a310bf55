"""Importing ``bilateralfilter`` from here gives :mod:`wsis.compat.bilateralfilter` itself."""

import sys

import wsis.compat.bilateralfilter

sys.modules[__name__] = wsis.compat.bilateralfilter
